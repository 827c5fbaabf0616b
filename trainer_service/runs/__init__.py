"""A run's life: sequencing, answers, loss of its worker. No torch."""
