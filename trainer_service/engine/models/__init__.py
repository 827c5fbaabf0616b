"""Models: from a Hugging Face repository or folder into memory, and out again."""
