"""Sums over rows of logits whose bits do not depend on how many rows there are.

On a CPU, threads divide rows among themselves; a row that is alone they cut up, and add their parts' sums: the same to
rounding, not to the bit. So a row that is alone is given itself for company.

Shape suffixes: N rows, V vocabulary.
"""

import torch
from torch import Tensor


def logsumexp(logits_NV: Tensor) -> Tensor:
    """Of each row, [N]."""
    return torch.logsumexp(_in_company(logits_NV), dim=-1)[: len(logits_NV)]


def row_sums(values_NV: Tensor) -> Tensor:
    """Of each row, [N]."""
    return _in_company(values_NV).sum(-1)[: len(values_NV)]


def _in_company(rows_NV: Tensor) -> Tensor:
    return rows_NV.expand(2, -1) if len(rows_NV) == 1 and rows_NV.device.type == "cpu" else rows_NV
