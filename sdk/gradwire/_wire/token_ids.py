"""What a tokenizer returned, taken as the token ids of one sequence."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def token_ids_of(tokens: Any, where: str) -> Any:
    """The token ids of one sequence in what stands for them.

    Taken as they are: a list, numpy array or torch tensor [N]. Looked into: the result of a tokenizer or of a chat
    template (BatchEncoding, a dict with "input_ids", tokenizers.Encoding), and a batch [1, N] of one sequence.

    Args:
        tokens: The value to read.
        where: What the caller calls it, for the error.

    Returns:
        What is to be read as an array [N] of integers; its ids are not checked.

    Raises:
        ValueError: Text, a mapping without "input_ids", a batch of several sequences, or a padded one.
    """
    if isinstance(tokens, str | bytes):
        raise ValueError(f"{where} is text; it must be token ids: tokenize it first, with get_tokenizer() for example.")
    if isinstance(tokens, Mapping):
        if "input_ids" not in tokens:
            keys = ", ".join(sorted(map(str, tokens))[:8]) or "nothing"
            raise ValueError(f'{where} is a {type(tokens).__name__} of {keys}; it must have "input_ids".')
        ids = _only_row(tokens["input_ids"], f'{where}["input_ids"]')
        _refuse_padding(tokens.get("attention_mask"), where)
        return ids
    if hasattr(tokens, "ids") and hasattr(tokens, "attention_mask"):
        _refuse_padding(tokens.attention_mask, where)
        return tokens.ids
    if isinstance(tokens, Sequence) and tokens and isinstance(tokens[0], Mapping):
        raise ValueError(
            f"{where} is a list of {type(tokens[0]).__name__}; it must be token ids: of messages, apply_chat_template "
            "makes them."
        )
    return _only_row(tokens, where)


def _only_row(tokens: Any, where: str) -> Any:
    """The one row of a batch of one; anything but a batch as it is."""
    shape = getattr(tokens, "shape", None)
    if shape is not None:
        batch = len(shape) == 2
    else:
        batch = isinstance(tokens, Sequence) and len(tokens) > 0 and _is_row(tokens[0])
    if not batch:
        return tokens
    if len(tokens) != 1:
        raise ValueError(f"{where} is a batch of {len(tokens)} sequences; it must be one sequence: take one row of it.")
    return tokens[0]


def _is_row(entry: Any) -> bool:
    """Whether an entry of a list is a sequence itself: a list, or an array that is no scalar."""
    return (isinstance(entry, Sequence) and not isinstance(entry, str | bytes)) or bool(getattr(entry, "shape", ()))


def _refuse_padding(attention_mask: Any, where: str) -> None:
    """Padding would be trained on, or sampled behind, as if it were text."""
    if attention_mask is None:
        return
    mask = np.asarray(attention_mask.detach().cpu() if hasattr(attention_mask, "detach") else attention_mask)
    padded = mask.size - np.count_nonzero(mask)
    if padded:
        raise ValueError(
            f"{where} is padded: its attention_mask leaves out {padded} of {mask.size} tokens. Gradwire packs "
            "sequences and needs no padding; tokenize without it."
        )
