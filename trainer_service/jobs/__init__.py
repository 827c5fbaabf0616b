"""Trainer jobs: trainers that are started, watched and stopped on request. Each trainer is a process of its own."""
