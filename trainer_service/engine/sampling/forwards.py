"""A model's forwards as sampling makes them: with attention of ours over caches of ours, or as the model itself does.

Shape suffixes: N new tokens, V vocabulary.
"""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from trainer_service.engine.device import Device
from trainer_service.engine.models.positions import context_length
from trainer_service.engine.sampling.attention import ATTENTION, Tokens, tokens_in_use
from trainer_service.engine.sampling.cache import CacheShape
from trainer_service.engine.sampling.decoding_plan import DecodingPlan
from trainer_service.engine.sampling.rows import RowsCache, forward_again, shape_of
from trainer_service.engine.sampling.slots import Pool
from trainer_service.engine.sampling.states import ROWS, cache_over, states_of


@dataclass
class Forwards:
    """Forwards of one model.

    Attributes:
        model: Its parameters are read, never changed.
        device: Where the model is.
        decoding: How samples are decoded; of a model of the same architecture.
    """

    model: PreTrainedModel
    device: Device
    decoding: DecodingPlan
    _configs: list[Any] = field(init=False)
    _arguments: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        # Modules share a few config objects; each says which attention its modules use.
        configs = {id(config): config for module in self.model.modules() if (config := getattr(module, "config", None))}
        self._arguments = frozenset(inspect.signature(self.model.forward).parameters)
        self._configs = [config for config in configs.values() if hasattr(config, "_attn_implementation")]

    def own_logits(self, tokens: list[int], positions: list[int] | None = None) -> Tensor:
        """What a plain forward of the model itself finds behind each token of a sequence, float32 [N, V].

        Args:
            tokens: N of them.
            positions: Theirs, where they are not those of a sequence.
        """
        return self.over_cache(None, tokens, positions, num_wanted=len(tokens))

    def find_row_shape(self) -> CacheShape:
        """What a token of a row takes (rows.py).

        Raises:
            NotImplementedError: See rows.shape_of.
        """
        cache = DynamicCache(config=self.model.config)
        self.over_cache(cache, [0], [0], num_wanted=1)
        return shape_of(cache, self.device.torch_device)

    def find_shape(self) -> CacheShape:
        """What a token takes, as the model's own cache has it after one.

        Raises:
            NotImplementedError: It keeps something else, or keys and values of several shapes.
        """
        cache = DynamicCache(config=self.model.config)
        self.over_cache(cache, [0], [0], num_wanted=1)
        states = states_of(cache)
        # Attention gives the tokens without a meaning zeros, and notes what it was called with.
        in_use = Tokens([], [], ROWS)
        self.in_a_row(in_use, [0] * ROWS, list(range(ROWS)), [0])
        with_keys = any(isinstance(getattr(layer, "keys", None), Tensor) for layer in cache.layers)
        if with_keys is not bool(in_use.calls) or not (with_keys or states):
            raise NotImplementedError("attention that does not go through transformers' interface")
        return CacheShape.of(in_use.calls, [shape for shape, _ in states], self.device.torch_device)

    def takes(self, argument: str) -> bool:
        """Whether the model's forward has an argument of that name."""
        return argument in self._arguments

    def in_rows(
        self, in_use: Tokens, cache: DynamicCache, tokens: list[list[int]], positions: Tensor, num_wanted: int
    ) -> Tensor:
        """Logits behind the last tokens of each row, with our attention, float32 [rows, num_wanted, V].

        Args:
            in_use: Whose tokens they are.
            cache: With what layers remember beside keys and values.
            tokens: Of each row.
            positions: Theirs, [rows, N].
            num_wanted: How many, at most N.
        """
        extra: dict[str, Any] = {"logits_to_keep": num_wanted} if self.takes("logits_to_keep") else {}
        if self.takes("position_ids"):
            extra["position_ids"] = positions
        with torch.no_grad(), self.device.autocast(), self._attention(ATTENTION), tokens_in_use(in_use):
            logits = self.model(
                input_ids=torch.tensor(tokens, device=positions.device),
                use_cache=True,
                **{self.decoding.cache_argument: cache},
                **extra,
            ).logits
            self._check_calls(in_use)
        return logits[:, -num_wanted:].float()

    def _check_calls(self, in_use: Tokens) -> None:
        shape = self.decoding.shape
        if shape is not None and len(in_use.calls) != shape.num_layers:
            raise NotImplementedError("attention that is not called alike every time")

    def in_a_row(self, in_use: Tokens, tokens: list[int], positions: list[int], wanted: list[int]) -> Tensor:
        """Logits behind some tokens of a row of them, with our attention, float32 [wanted, V].

        Args:
            in_use: Whose tokens they are.
            tokens: A multiple of ROWS.
            positions: Theirs.
            wanted: Their numbers in the row.
        """
        # The head's rows are padded as well, for the same reason.
        rows = wanted + [wanted[0]] * (-len(wanted) % ROWS)
        device = self.device.torch_device
        logits_to_keep = (
            torch.tensor(rows, device=device) if self.takes("logits_to_keep") and len(rows) < len(tokens) else None
        )
        extra: dict[str, Any] = {} if logits_to_keep is None else {"logits_to_keep": logits_to_keep}
        places = torch.tensor(positions, device=device)
        extra |= {"use_cache": False}
        if self.decoding.placed:
            before = places - torch.arange(len(positions), device=device)
            extra |= {"use_cache": True, self.decoding.cache_argument: cache_over(self.model.config, [], before)}
        with torch.no_grad(), self.device.autocast(), self._attention(ATTENTION), tokens_in_use(in_use):
            logits_NV = self.model(
                input_ids=torch.tensor([tokens], device=device), position_ids=places[None], **extra
            ).logits[0]
            self._check_calls(in_use)
        if logits_to_keep is not None:
            return logits_NV[: len(wanted)].float()
        in_order = wanted == list(range(len(wanted)))
        return (logits_NV[: len(wanted)] if in_order else logits_NV[wanted]).float()

    def over_cache(self, cache: Any, tokens: list[int], positions: Sequence[int] | None, *, num_wanted: int) -> Tensor:
        """Logits behind the last `num_wanted` of new tokens, by the model's own attention.

        Args:
            cache: Of what comes before them; a list of tokens is computed again, None is for nothing.
            tokens: New ones; what comes behind them goes on from the cache.
            positions: Theirs; None leaves them to the model, as training does.
            num_wanted: At most as many as new tokens.
        """
        device = self.device.torch_device
        extra: dict[str, Any] = {"logits_to_keep": num_wanted} if self.takes("logits_to_keep") else {}
        if isinstance(cache, list):
            cache += tokens
            cache, tokens, positions = None, cache, None
        if positions is not None and self.takes("position_ids"):
            extra["position_ids"] = torch.tensor([*positions], device=device)[None]
        extra |= {"use_cache": False} if cache is None else {"use_cache": True, self.decoding.cache_argument: cache}
        return self._plain([tokens], **extra)[0, -num_wanted:].float()

    def over_slots(self, pool: Pool, tokens: list[int]) -> Tensor:
        """Logits behind the new token of each slot, for which there is room, in rows; float32 [slots, V]."""
        cache = RowsCache(pool, max_tokens=context_length(self.model.config.get_text_config()))
        extra: dict[str, Any] = {"position_ids": cache.lengths_n[:, None]} if self.takes("position_ids") else {}
        extra |= {"use_cache": True, self.decoding.cache_argument: cache, "attention_mask": cache.mask_nS}
        rows = [[token] for token in tokens + [0] * (pool.num_rows - len(tokens))]
        logits_NV = self._plain(rows, **extra)[: len(tokens), -1].float()
        for slot in pool.slots:
            slot.length += 1
        return logits_NV

    def again(self, samples: list[list[int]]) -> Tensor:
        """Logits behind all tokens of each sample, computed without a cache, float32 [samples, V]."""
        return forward_again(self._plain, samples, with_index=self.takes("logits_to_keep"))

    def _plain(self, tokens: list[list[int]], **extra: Any) -> Tensor:
        """Logits of a forward of rows with the model's own attention, [rows, N, V]."""
        with torch.no_grad(), self.device.autocast(), self._attention(self.decoding.attention):
            inputs = torch.tensor(tokens, device=self.device.torch_device)
            return self.model(input_ids=inputs, **extra).logits

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
