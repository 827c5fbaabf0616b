"""Checkpoints as the trainer sees them: the catalog (names, manifests, owners, time to live) and the store. No torch.

The worker writes checkpoints, whole or not at all, to the local folder. The catalog reads that folder and the store, if
there is one, which outlives the machine.
"""
