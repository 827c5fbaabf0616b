"""Trainer jobs: trainers started, watched and stopped for those who ask. Each trainer is a process of its own."""
