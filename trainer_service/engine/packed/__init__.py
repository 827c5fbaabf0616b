"""Packs of sequences: how they are made, run, and turned into logprobs."""
