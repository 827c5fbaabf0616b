"""Checkpoints as the trainer sees them: the catalog (names, manifests, owners, time to live) and the store. No torch.

The worker writes them, whole or not at all, to the local folder; the catalog reads that folder and, where there is one,
the store, which outlives the machine.
"""
