"""A model as sampling uses it: new tokens in, logits out, everything before them cached.

Most architectures send attention through transformers' interface; they decode the requests of a step together, in one
row without padding (attention.py). Those that do not (recurrent ones, or with a bias of their own) decode each sample
by itself over transformers' own cache: the same numbers, slower. Those whose cache does not go on from where it was
compute everything again for every token. Which it is, is found by trying.

Shape suffixes: N new tokens, C tokens of a prompt so far, V vocabulary.
"""

import contextlib
import copy
import dataclasses
import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from trainer_service.engine.device import Device
from trainer_service.engine.sampling.attention import ATTENTION, Part, Tokens, tokens_in_use
from trainer_service.engine.sampling.cache import Block, CacheShape

logger = logging.getLogger(__name__)

MIN_ROWS = 8
"""Forwards have at least this many rows. On the CPU a matrix product of one to three rows adds up in another order than
one of more, whose rows come out the same however many there are: so a sample's numbers do not depend on its company."""
_CACHE_ARGUMENTS = ("past_key_values", "cache_params")
_TRIAL = (3, 7, 5, 2, 11, 6, 4, 9)
_TRIAL_TOLERANCE = 1e-3


class Sequences:
    """The samples of one request, and what the model remembers of them.

    Args:
        num_samples: How many will continue the prompt.
    """

    def __init__(self, num_samples: int) -> None:
        self.num_samples = num_samples
        self.prompt: Block | None = None
        self.own: Block | None = None
        """What each of several samples generated; None where one sample goes on in `prompt`."""
        self.caches: list[Any] = []
        """Where samples are decoded by themselves: of the prompt at first, then one a sample."""
        self.length = 0
        """Tokens each sample has been through."""

    def keep(self, samples: list[int]) -> None:
        """Lets go of all samples but these, by their present numbers."""
        self.num_samples = len(samples)
        if self.own is not None:
            self.own.keep(samples)
        elif self.caches:
            self.caches = [self.caches[sample] for sample in samples]


@dataclass
class Decoder:
    """Runs one model over caches.

    Attributes:
        model: Its parameters are read, never changed.
        device: Where.
        shape: Of a cached token; None where each sample is decoded by itself.
        why_alone: Why it is; "" where they are decoded together.
        cache_argument: Under which name the model takes its own cache; "" where it is of no use.
    """

    model: PreTrainedModel
    device: Device
    shape: CacheShape | None = None
    why_alone: str = ""
    cache_argument: str = ""
    _configs: list[Any] = field(init=False)
    _arguments: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        # Modules share a few config objects; each says which attention its modules use.
        configs = {id(config): config for module in self.model.modules() if (config := getattr(module, "config", None))}
        self._arguments = frozenset(inspect.signature(self.model.forward).parameters)
        self._configs = [config for config in configs.values() if hasattr(config, "_attn_implementation")]

    @classmethod
    def of(cls, model: PreTrainedModel, device: Device) -> "Decoder":
        """The decoder of a model, tried on a few tokens."""
        # Tried in float32 whatever will be computed in: then what differs is the model's doing, not rounding's.
        trial = cls(model, dataclasses.replace(device, compute_dtype=torch.float32))
        trial.cache_argument = next(filter(trial._takes, _CACHE_ARGUMENTS), "")
        try:
            trial.shape = trial._find_shape()
            trial._try_out()
        except Exception as exc:
            # Whatever a model does that we do not foresee, another way serves it.
            trial.shape, trial.why_alone = None, str(exc).partition("\n")[0] or type(exc).__name__
            fields = {"architecture": type(model).__name__, "why": trial.why_alone}
            logger.warning("Samples are decoded one by one: slower, same tokens.", extra={"fields": fields})
            try:
                trial._try_out()
            except Exception as exc:
                trial.cache_argument = ""
                fields = {"architecture": type(model).__name__, "why": str(exc).partition("\n")[0]}
                logger.warning("Every token computes all before it again: very slow.", extra={"fields": fields})
        decoder = cls(model, device, None, trial.why_alone, trial.cache_argument)
        if trial.shape is not None:
            decoder.shape = decoder._find_shape()
        return decoder

    def prefill(self, sequences: Sequences, tokens: list[int], *, all_logits: bool) -> Tensor:
        """Takes the next tokens of a prompt in.

        Args:
            sequences: Whose prompt.
            tokens: N of them.
            all_logits: Whether the logits behind each are wanted, or only those behind the last.

        Returns:
            float32 [N, V] or [1, V].
        """
        wanted = list(range(len(tokens))) if all_logits else [len(tokens) - 1]
        positions = list(range(sequences.length, sequences.length + len(tokens)))
        if self.shape is None:
            if not sequences.caches:
                sequences.caches = [self._new_cache()]
            logits_NV = self._forward_alone(sequences.caches[0], tokens, positions)[wanted]
        else:
            if sequences.prompt is None:
                sequences.prompt = Block(self.shape, 1, len(tokens) + 1)
            logits_NV = self._forward([Part.of(sequences.prompt, len(tokens))], tokens, positions, wanted)
        sequences.length += len(tokens)
        return logits_NV

    def branch(self, sequences: Sequences) -> None:
        """The prompt is complete: from here each sample goes its own way."""
        if self.shape is None:
            sequences.caches += [copy.deepcopy(sequences.caches[0]) for _ in range(sequences.num_samples - 1)]
        elif sequences.num_samples > 1:
            sequences.own = Block(self.shape, sequences.num_samples, 1)

    def decode(self, batch: list[Sequences], tokens: list[int]) -> Tensor:
        """One more token of every sample.

        Args:
            batch: Requests.
            tokens: Of their samples, one after the other.

        Returns:
            Logits behind them, float32 [tokens, V].
        """
        if self.shape is None:
            logits_NV = self._decode_alone(batch, tokens)
        else:
            parts, positions = [], []
            for sequences in batch:
                assert sequences.prompt is not None, "decode before prefill"
                own, prompt = sequences.own, sequences.prompt
                parts.append(Part.of(prompt, 1) if own is None else Part.of(own, 1, prompt))
                positions += [sequences.length] * sequences.num_samples
            logits_NV = self._forward(parts, tokens, positions, list(range(len(tokens))))
        for sequences in batch:
            sequences.length += 1
        return logits_NV

    def _forward(self, parts: list[Part], tokens: list[int], positions: list[int], wanted: list[int]) -> Tensor:
        num_padding = max(0, MIN_ROWS - len(tokens))
        in_use = Tokens(parts, num_padding)
        # The head's rows are padded as well, for the same reason.
        rows = wanted + [wanted[0]] * max(0, MIN_ROWS - len(wanted))
        device = self.device.torch_device
        logits_to_keep = (
            torch.tensor(rows, device=device) if self._takes("logits_to_keep") and len(rows) < len(tokens) else None
        )
        extra = {} if logits_to_keep is None else {"logits_to_keep": logits_to_keep}
        with torch.no_grad(), self.device.autocast(), self._attention(ATTENTION), tokens_in_use(in_use):
            logits_NV = self.model(
                input_ids=torch.tensor([tokens + [0] * num_padding], device=device),
                position_ids=torch.tensor([positions + [0] * num_padding], device=device),
                use_cache=False,
                **extra,
            ).logits[0]
            if self.shape is not None and len(in_use.layers_seen) != self.shape.num_layers:
                raise NotImplementedError("layers that share their keys")
        if logits_to_keep is not None:
            return logits_NV[: len(wanted)].float()
        return (logits_NV[: len(tokens)] if len(wanted) == len(tokens) else logits_NV[wanted]).float()

    def _new_cache(self) -> Any:
        """The model's own, or else the tokens themselves."""
        return DynamicCache(config=self.model.config) if self.cache_argument else []

    def _forward_alone(self, cache: Any, tokens: list[int], positions: list[int]) -> Tensor:
        device = self.device.torch_device
        with torch.no_grad(), self.device.autocast(), self._attention("eager"):
            if isinstance(cache, list):
                cache += tokens
                logits_CV = self.model(input_ids=torch.tensor([cache], device=device), use_cache=False).logits[0]
                return logits_CV[-len(tokens) :].float()
            places = {"position_ids": torch.tensor([positions], device=device)} if self._takes("position_ids") else {}
            return (
                self.model(
                    input_ids=torch.tensor([tokens], device=device),
                    use_cache=True,
                    **{self.cache_argument: cache},
                    **places,
                )
                .logits[0]
                .float()
            )

    def _decode_alone(self, batch: list[Sequences], tokens: list[int]) -> Tensor:
        rows, place = [], 0
        for sequences in batch:
            for cache in sequences.caches:
                rows.append(self._forward_alone(cache, [tokens[place]], [sequences.length]))
                place += 1
        return torch.cat(rows)

    def _takes(self, argument: str) -> bool:
        return argument in self._arguments

    @contextlib.contextmanager
    def _attention(self, implementation: str) -> Iterator[None]:
        """The model's attention is this one within. Training goes on with its own."""
        before = [config._attn_implementation for config in self._configs]
        try:
            for config in self._configs:
                config._attn_implementation = implementation
            yield
        finally:
            for config, own in zip(self._configs, before, strict=True):
                config._attn_implementation = own

    def _find_shape(self) -> CacheShape:
        """What a token takes, as the model's own cache has it after one."""
        cache = DynamicCache(config=self.model.config)
        self._forward_alone(cache, [0], [0])
        found = set()
        for layer in cache.layers:
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if not isinstance(keys, Tensor) or not isinstance(values, Tensor):
                raise NotImplementedError(f"{type(layer).__name__} without keys and values")
            found.add((keys.shape[1], keys.shape[3], values.shape[3], keys.dtype))
        if len(found) != 1:
            raise NotImplementedError("layers whose keys differ in shape")
        num_heads, key_size, value_size, dtype = found.pop()
        return CacheShape(len(cache.layers), num_heads, key_size, value_size, dtype, self.device.torch_device)

    def _try_out(self) -> None:
        """Decodes two samples of one prompt, and a third beside them, as the model itself computes them."""
        tokens = [token % self.model.config.get_text_config().vocab_size for token in _TRIAL]
        pair, single = Sequences(2), Sequences(1)
        self.prefill(pair, tokens[:2], all_logits=False)
        self.prefill(pair, tokens[2:5], all_logits=False)
        self.prefill(single, tokens[:3], all_logits=False)
        self.branch(pair)
        self.branch(single)
        self.decode([pair, single], [tokens[5], tokens[6], tokens[3]])
        got = self.decode([pair, single], [tokens[6], tokens[7], tokens[4]])
        for row, whole in zip(
            got, ([*tokens[:5], tokens[5], tokens[6]], [*tokens[:5], tokens[6], tokens[7]], tokens[:5]), strict=True
        ):
            own = self._forward_alone([], whole, [])[-1]
            error = float((own - row).abs().max() / own.abs().max().clamp(min=1.0))
            if not error < _TRIAL_TOLERANCE:
                raise NotImplementedError(f"attention that comes out otherwise, by {error:.2g}")
