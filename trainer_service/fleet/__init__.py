"""Starts, watches and talks to workers. No torch."""
