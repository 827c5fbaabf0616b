"""Runs and models as files: states, snapshots, checkpoints, deltas."""
