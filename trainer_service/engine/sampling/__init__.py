"""Sampling: generates tokens with the very parameters that train, between the operations of runs."""
