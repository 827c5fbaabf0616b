"""Gradwire: train language models on a self-hosted trainer from an ordinary Python loop."""
