"""Finds out what an architecture allows by trying.

Names and classes of architectures are not consulted: a loaded model is run over a few short sequences, one by one as it
came, then packed, or else in padded rows, as we mean to run it. What gives other results is not done. Where only long
sequences would show a difference, the model's configuration says so, and what it says is tried at a few tokens.

Shape suffixes: T tokens, D hidden size, V vocabulary, K targets a token.
"""

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from gradwire.errors import invalid_field
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer_service.engine.fused.install import fuse
from trainer_service.engine.models.batching import plan
from trainer_service.engine.models.comparison import relative_difference
from trainer_service.engine.models.experts import GROUPED, use_experts
from trainer_service.engine.models.positions import Boundary, boundaries, moved, rope_boundaries
from trainer_service.engine.models.runner import (
    HeadTraits,
    Traits,
    checkpointable_layers,
    checkpointed,
    head_of,
    prepare,
    quiet_transformers,
    use_attention,
)
from trainer_service.engine.packed import attention, recurrences
from trainer_service.engine.packed.attention import ATTENTION, PackAttention, pack_in_use
from trainer_service.engine.packed.logprobs import linear_logprobs, target_logprobs
from trainer_service.engine.packed.packing import Pack, plan_packs
from trainer_service.engine.parallel.expert_parallel import find_experts

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-4
"""Largest difference, relative to the largest value, between two ways to compute the same in float32."""
_PROBE_LENGTHS = (13, 21, 8, 13)
_PROBE_SHARED = 6
"""Tokens that the sequences of the probe begin with, but for the third."""
_MOVED_TO = 8
"""Tokens at which boundaries are tried that lie beyond the probe's sequences."""
_PACKABLE_LAYERS = {"full_attention", "sliding_attention", "linear_attention", "conv", "hybrid", "moe"}
"""Kinds of layers of which a few tokens show whether they can be packed."""


def find_traits(model: PreTrainedModel, device: torch.device, *, max_context_length: int) -> Traits:
    """Tries the model out. Leaves it as it was, but for what `prepare` does anyway.

    Args:
        model: In float32, on the device.
        device: Where the model is.
        max_context_length: Longest sequence there will be, tokens.

    Raises:
        InvalidArgumentError: INVALID_FIELD: a forward changes the model.
    """
    tokens = _probe_tokens(model)
    versions = [parameter._version for parameter in model.parameters()]
    alone = _all_alone(model, tokens, device)
    if versions != [parameter._version for parameter in model.parameters()]:
        raise invalid_field(
            "base_model",
            f"is a {type(model).__name__} whose forward changes its own parameters, so that another would be saved. "
            "RWKV does so unless its config.json has rescale_every at 0: set that, or take another model.",
        )
    # Before anything is compared with what the model itself found.
    fuse(model)
    recurrences.take_over(model)
    before = str(model.config._attn_implementation)
    turned = [one for one in rope_boundaries(model.config.get_text_config()) if one.length < max_context_length]
    traits = Traits(
        attention=before,
        experts=_find_experts(model, tokens, alone, device),
        why_not_packed=_why_never_packed(model),
        head=_find_head(model, tokens, alone, device),
        boundaries=tuple(turned),
    )
    trial = _Trial(model, device, tokens, alone, max_context_length)
    if traits.packed:
        why = trial.why_not(replace(traits, why_not_shared="not yet"), moving=turned)
        traits = replace(traits, why_not_packed=why)
    if traits.packed:
        traits = replace(traits, why_not_shared=trial.why_not(traits, moving=turned))
        if device.type == "cuda":
            attention.varlen_enabled = _varlen_is_right(model, device)
    else:
        use_attention(model, before)
        passed = boundaries(model, max_context_length=max_context_length)
        traits = replace(traits, why_not_padded=trial.why_not(traits, moving=passed))
    traits = _with_measured_bytes(model, traits, tokens[1], device)
    logger.info("Found out what the model allows.", extra={"fields": {"batching": traits.batching}})
    return traits


def _probe_tokens(model: PreTrainedModel) -> list[Tensor]:
    vocab_size = model.get_input_embeddings().weight.shape[0]  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(int(vocab_size), (length,), generator=generator) for length in _PROBE_LENGTHS]
    for number in (1, 3):
        tokens[number][:_PROBE_SHARED] = tokens[0][:_PROBE_SHARED]
        # They differ from there on, whatever was drawn.
        tokens[number][_PROBE_SHARED] = (tokens[0][_PROBE_SHARED] + number) % int(vocab_size)
    return tokens


@dataclass(frozen=True)
class _Plain:
    """What the model itself finds for one sequence: hidden states [T, D] where it shows them, logits [T, V]."""

    hidden_TD: Tensor | None
    logits_TV: Tensor


def _all_alone(model: PreTrainedModel, tokens: Sequence[Tensor], device: torch.device) -> list[_Plain]:
    with torch.no_grad():
        return [_plain(model, ids.to(device)) for ids in tokens]


def _plain(model: PreTrainedModel, tokens_T: Tensor) -> _Plain:
    with quiet_transformers():
        base = model.base_model
        hidden = None if base is model else base(input_ids=tokens_T[None], use_cache=False)
        logits_TV = model(input_ids=tokens_T[None], use_cache=False).logits[0]
    found = getattr(hidden, "last_hidden_state", None)
    return _Plain(None if found is None else found[0], logits_TV)


def _find_head(
    model: PreTrainedModel, tokens: Sequence[Tensor], alone: Sequence[_Plain], device: torch.device
) -> HeadTraits | None:
    """The head that makes the model's own logprobs of its hidden states; None if none of those we know does."""
    linear = model.get_output_embeddings()
    hidden_TD, logits_TV = alone[0].hidden_TD, alone[0].logits_TV
    if not isinstance(linear, nn.Linear) or hidden_TD is None or hidden_TD.shape[-1] != linear.weight.shape[1]:
        return None
    config = model.config.get_text_config()
    scales = [1.0]
    scales += [float(value) for name in ("logit_scale", "lm_head_multiplier") if (value := getattr(config, name, None))]
    scales += [1 / float(value) for name in ("logits_scaling",) if (value := getattr(config, name, None))]
    # Whatever it is called: final_logit_softcapping, logits_soft_cap.
    caps = [float(value) for name, value in vars(config).items() if "cap" in name and isinstance(value, int | float)]
    targets_TK = torch.cat([tokens[0][1:], tokens[0][:1]]).to(device)[:, None].expand(-1, 3).clone()
    targets_TK[:, 1] = 0
    targets_TK[:, 2] = logits_TV.shape[1] - 1
    with torch.no_grad():
        wanted_TK = target_logprobs(logits_TV, targets_TK)
        # The nearest: small logits come out nearly alike with a cap and without.
        tried = {
            traits: relative_difference(linear_logprobs(hidden_TD, head_of(model, traits), targets_TK), wanted_TK)
            for traits in (HeadTraits(scale, cap) for scale in scales for cap in (None, *filter(None, caps)))
        }
    nearest = min(tried, key=tried.__getitem__)
    return nearest if tried[nearest] <= _TOLERANCE else None


def _find_experts(
    model: PreTrainedModel, tokens: Sequence[Tensor], alone: Sequence[_Plain], device: torch.device
) -> str:
    """The implementation of routed experts that trains, in use from here on; empty where it is the model's own."""
    before = {name: module.config._experts_implementation for name, module in find_experts(model).items()}
    if not before:
        return ""
    try:
        with torch.no_grad():
            use_experts(model, GROUPED)
            found = [_plain(model, ids.to(device)).logits_TV for ids in tokens]
        if all(_close(logits_TV, one.logits_TV) for logits_TV, one in zip(found, alone, strict=True)):
            return GROUPED
        why = "it gives other results"
    except Exception as exc:
        why = f"it fails ({type(exc).__name__}: {str(exc).splitlines()[0] if str(exc) else ''})"
    for name, module in find_experts(model).items():
        module.config._experts_implementation = before[name]
    logger.warning("Experts are computed by transformers.", extra={"fields": {"why": why}})
    return ""


def _why_never_packed(model: PreTrainedModel) -> str:
    """What only sequences longer than the probe's would show."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - _PACKABLE_LAYERS
    if kinds:
        return f"it has layers of kind {', '.join(sorted(map(str, kinds)))}"
    if getattr(config, "attention_chunk_size", None):
        return "its attention goes by chunks of the sequence"
    return ""


@dataclass(frozen=True)
class _Trial:
    """Sequences of the probe, computed as traits allow and compared with each alone.

    Attributes:
        model: In float32.
        device: Where it is.
        tokens: The sequences.
        alone: What the model finds for each.
        max_context_length: Longest sequence there will be, tokens.
    """

    model: PreTrainedModel
    device: torch.device
    tokens: Sequence[Tensor]
    alone: Sequence[_Plain]
    max_context_length: int

    def why_not(self, traits: Traits, *, moving: Sequence[Boundary]) -> str:
        """Why they come out otherwise, in a few words; empty if they do not.

        Args:
            traits: How they are batched.
            moving: Boundaries of the model's, which are tried at _MOVED_TO tokens as well.
        """
        why = self._why_not(traits, self.alone)
        if why or not moving:
            return why
        use_attention(self.model, traits.attention)
        here = replace(traits, boundaries=tuple(replace(one, length=_MOVED_TO) for one in traits.boundaries))
        with moved(self.model, moving, _MOVED_TO):
            return self._why_not(here, _all_alone(self.model, self.tokens, self.device))

    def _why_not(self, traits: Traits, alone: Sequence[_Plain]) -> str:
        tokens_T = torch.cat(list(self.tokens))
        bounds = np.cumsum([0, *map(len, self.tokens)]).astype(np.int64)
        shared = traits.packed and not traits.why_not_shared
        packs = plan(
            tokens_T.numpy().astype(np.int32),
            bounds,
            traits,
            max_tokens=len(self.tokens) * max(map(len, self.tokens)),
            min_shared_tokens=_PROBE_SHARED,
        )
        assert shared == any(pack.num_shared_tokens for pack in packs)
        for pack in packs:
            packed = PackAttention.of(pack) if traits.packed else None
            try:
                logits_RV = self._logits(pack, packed, tokens_T.to(self.device))
            except recurrences.CarriesStateError as exc:
                return str(exc)
            except Exception as exc:
                what = f"{type(exc).__name__}: {str(exc).splitlines()[0] if str(exc) else ''}"
                return f"its forward of {'a pack' if packed else 'several rows'} fails ({what})"
            if packed is not None and (why := self._why_windows_differ(packed)):
                return why
            for number, (start, stop) in zip(pack.sequences, pairwise(pack.cu_seqlens.tolist()), strict=True):
                if not _close(logits_RV[start:stop], alone[number].logits_TV):
                    if packed is None:
                        return "rows come out otherwise beside one another"
                    return (
                        "sequences give other results when they share beginnings"
                        if shared
                        else "packed sequences see one another"
                    )
        return ""

    def _why_windows_differ(self, packed: PackAttention) -> str:
        if not packed.windows and not packed.num_recurrences:
            return "its attention does not go through transformers' interface"
        window = _sliding_window(self.model)
        if window and not any(packed.windows) and self.max_context_length > window:
            return "its attention does not say what its sliding window is"
        return ""

    def _logits(self, pack: Pack, packed: PackAttention | None, tokens_T: Tensor) -> Tensor:
        """Behind the rows that a pack answers, [R, V]."""
        extra: dict[str, Any] = {}
        if packed is not None:
            use_attention(self.model, ATTENTION)
            extra["position_ids"] = torch.from_numpy(pack.positions_T).to(self.device)[None]
        inputs_BL = tokens_T[torch.from_numpy(pack.token_rows_T).to(self.device)].view(pack.num_rows, -1)
        with torch.no_grad(), quiet_transformers(), pack_in_use(packed):
            logits_TV = self.model(input_ids=inputs_BL, use_cache=False, **extra).logits.flatten(0, 1)
        if pack.token_of_row_R is None:
            return logits_TV
        return logits_TV[torch.from_numpy(pack.token_of_row_R).to(self.device)]


def _sliding_window(model: PreTrainedModel) -> int:
    """Tokens that some layer's attention is limited to; 0 for none."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and "sliding_attention" not in kinds:
        return 0
    return int(getattr(config, "sliding_window", None) or 0)


def _close(got: Tensor, wanted: Tensor) -> bool:
    """Whether two ways of computing the same gave the same result; a NaN never does."""
    return relative_difference(got, wanted) <= _TOLERANCE


def _with_measured_bytes(model: PreTrainedModel, traits: Traits, tokens_T: Tensor, device: torch.device) -> Traits:
    """Runs one sequence with a graph and adds up what the graph holds."""
    prepare(model, traits)
    tokens_T = tokens_T.to(device)
    (pack,) = plan_packs(
        tokens_T.cpu().numpy().astype(np.int32), np.array([0, len(tokens_T)]), max_tokens=len(tokens_T), share=False
    )
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def held_bytes(checkpointing: bool) -> int:
        seen: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                seen[storage.data_ptr()] = storage.nbytes()
            # Detached: one that an operation returned and saves would keep its own graph for ever, with the parameters.
            return tensor.detach()

        with (
            torch.enable_grad(),
            pack_in_use(PackAttention.of(pack) if traits.packed else None),
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            checkpointed(model) if checkpointing else contextlib.nullcontext(),
            quiet_transformers(),
        ):
            extra: dict[str, Any] = {}
            if traits.packed:
                extra["position_ids"] = torch.arange(len(tokens_T), device=device)[None]
            # Kept until everything is added up, so that no address is used twice.
            output = model.base_model(input_ids=tokens_T[None], use_cache=False, **extra)
        total = sum(seen.values())
        del output
        return total

    held = held_bytes(False)
    layers = checkpointable_layers(model)
    recomputing = 0
    if layers:
        hidden_size = int(model.config.get_text_config().hidden_size)
        # Each layer's input is held by the checkpoint itself, where no hook sees it.
        recomputing = held_bytes(True) + len(layers) * hidden_size * 4 * len(tokens_T)
    return replace(
        traits,
        held_bytes_per_token=held // len(tokens_T),
        checkpointed_bytes_per_token=recomputing // len(tokens_T) if recomputing < held else 0,
    )


def _varlen_is_right(model: PreTrainedModel, device: torch.device) -> bool:
    """Whether torch's FlashAttention over variable lengths exists and gives what plain attention does."""
    config = model.config.get_text_config()
    num_heads = int(config.num_attention_heads)
    num_kv_heads = int(getattr(config, "num_key_value_heads", None) or num_heads)
    head_size = int(getattr(config, "head_dim", None) or config.hidden_size // num_heads)
    generator = torch.Generator(device).manual_seed(0)
    bounds = np.array([0, 13, 34])
    (pack,) = plan_packs(np.arange(34, dtype=np.int32), bounds, max_tokens=34, share=False)

    def draw(heads: int) -> Tensor:
        return torch.randn(1, heads, 34, head_size, generator=generator, device=device, dtype=torch.bfloat16)

    query, key, value = draw(num_heads), draw(num_kv_heads), draw(num_kv_heads)
    module = nn.Module()
    for window in (None, 5):
        found: list[Tensor] = []
        for enabled in (True, False):
            attention.varlen_enabled = enabled
            try:
                with torch.no_grad(), pack_in_use(PackAttention.of(pack)):
                    output, _ = attention.packed_attention(module, query, key, value, None, sliding_window=window)
            except Exception as exc:
                logger.warning("torch's variable-length attention cannot be used.", extra={"fields": {"why": str(exc)}})
                return False
            found.append(output.float())
        if (found[0] - found[1]).abs().max() > 0.05:
            logger.warning("torch's variable-length attention is wrong on this device; doing without.")
            return False
    return True
