"""The worker's side of the trainer's stream: commands in, answers out."""
