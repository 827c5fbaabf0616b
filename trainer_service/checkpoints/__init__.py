"""The catalog of checkpoints (names, manifests, time to live) and their storage. No torch.

For now exports are written by the worker under `checkpoint_dir`, and this room is empty; resumable state, listing,
deleting and downloading belong here.
"""
