"""Whether layers that are cut for tensor parallel compute what whole ones do, tried on a model's first few."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trainer_service.engine.models.runner import quiet_transformers, use_attention
from trainer_service.engine.parallel.cut_layers import Cutting
from trainer_service.engine.parallel.tensor_parallel import TensorParallel

_NUM_TOKENS = 8
_TOLERANCE = 0.03
"""Relative difference of hidden states, or of a gradient. Rounding makes a thousandth of it; a wrong plan, as large a
difference as the whole."""
_NOISE = 1e-5
"""Of the norm of all gradients; one that is smaller may be nothing but rounding."""


def why_not_cut(model: PreTrainedModel, group: TensorParallel, *, attention: str) -> str:
    """Why a model is not what it was once it is cut; empty where it is. Every rank of the group calls this.

    Args:
        model: Whole, the same on every rank, and not to be used any more afterwards.
        group: Would compute its layers.
        attention: The implementation of attention it is tried with.
    """
    use_attention(model, attention)
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        # They are cut in our own way, and as large as many layers.
        for parameter in module.parameters() if module is not None else ():
            parameter.requires_grad_(False)
    wholes = dict(model.named_parameters())
    hidden, gradients = _try(model)
    cutting = Cutting(model, group)
    wanted = {name: cutting.own(wholes[name], grad) for name, grad in gradients.items()}
    cutting.cut(model)
    try:
        got_hidden, got = _try(model)
    except (RuntimeError, ValueError, TypeError, AttributeError) as exc:
        return f"{type(exc).__name__}: {str(exc).strip().splitlines()[0]}"
    if not (got_hidden - hidden).norm() <= _TOLERANCE * hidden.norm():
        return "hidden states come out otherwise"
    noise = _NOISE * torch.stack([grad.norm() for grad in wanted.values()]).norm()
    for name, grad in wanted.items():
        found = got.get(name)
        if found is None or not (found - grad).norm() <= _TOLERANCE * grad.norm() + noise:
            return f"the gradient of {name} comes out otherwise"
    return ""


def _try(model: PreTrainedModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states of a few tokens, and gradients of their sum weighted at random."""
    table: Any = model.get_input_embeddings()
    device, vocab_size = table.weight.device, model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(int(vocab_size), (1, _NUM_TOKENS), generator=generator)
    with torch.enable_grad(), quiet_transformers():
        hidden = model.base_model(input_ids=tokens.to(device), use_cache=False).last_hidden_state
        weights = torch.randn(hidden.shape, generator=generator)
        (hidden * weights.to(device)).sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for parameter in model.parameters():
        parameter.grad = None
    return hidden.detach(), gradients
