"""What the trainer imports too: tensors and messages on the wire, and the checks on what arrives."""
