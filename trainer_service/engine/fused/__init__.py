"""Parts of transformers' layers as one autograd function each: fewer operations, fewer tensors held for backward."""
