"""Packs of sequences without padding: how they are planned, attended within, and turned into logprobs."""
