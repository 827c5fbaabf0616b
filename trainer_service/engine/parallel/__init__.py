"""Many ranks: a model in parts, and each rank's share of a batch."""
