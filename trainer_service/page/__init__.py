"""The live page of a trainer, in the trainer's own process. No torch."""
