"""Creates runs: with parameters of their own, or with an adapter beside a base model that they share."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from trainer_service.adapter_folders import starred
from trainer_service.engine.models import lora
from trainer_service.engine.models.adapter_files import load_adapter
from trainer_service.engine.models.lora import LoraSettings, MergedParts
from trainer_service.engine.models.lora_experts import adapted_weights
from trainer_service.engine.models.lora_targets import Targets
from trainer_service.engine.optim import AdamW
from trainer_service.engine.parallel.sharding import free_cycles
from trainer_service.engine.rank_channels import Ranks
from trainer_service.engine.run_state import RunState

_READERS = ""
"""Stands for readers of the shared base model that are not runs; it then stays shared."""

_Weak = Callable[[], PreTrainedModel | None]
"""A weak reference."""


def _nothing() -> None:
    """A weak reference to no model."""


class BaseModels:
    """Creates the runs of one base model, and keeps as few copies of its parameters as possible.

    A copy is in one of five states. Of the first four there is at most one copy each:

        unused      loaded, and not used
        shared      frozen, and perhaps in half the memory; adapters train beside it, and it is read
        lent        loaded only for reading; it lives as long as its readers
        unchanged   of a run that trains all parameters, while they still equal the base model's; it is also read
        changed     of a run that trains all parameters, from its first change on, or while another is lent or unchanged

        event                           from → to                  if there is none
        __init__                        → unused
        base_model                      nothing moves              → lent
        full                            unused → unchanged         → unchanged
        lora, from_adapter,             unused → shared,           → shared
          adapted_model                   or else lent → shared
        will_change                     unchanged → changed
        full, while nobody shares it    shared → let go

    Args:
        base_model: Its name.
        first: A loaded copy, for the first run.
        load: Loads another copy.
        for_adapters: Of a frozen copy, makes the one beside which adapters train; it may be the same.
        targets: What of it an adapter can be put beside.
        ranks: Share the models.
    """

    def __init__(
        self,
        base_model: str,
        *,
        first: PreTrainedModel,
        load: Callable[[], PreTrainedModel],
        for_adapters: Callable[[PreTrainedModel], PreTrainedModel],
        targets: Targets,
        ranks: Ranks,
    ) -> None:
        self._ranks = ranks
        self._base_model = base_model
        self._load = load
        self._for_adapters = for_adapters
        self._unused: PreTrainedModel | None = first
        self._shared: PreTrainedModel | None = None
        self._lent: _Weak = _nothing
        self._unchanged: _Weak = _nothing
        self._sharing: set[str] = set()
        self._targets = targets
        self._hidden_size: int = first.config.get_text_config().hidden_size

    def base_model(self) -> PreTrainedModel:
        """The base model, for reading: a copy that no run has changed, loaded if there is none."""
        model = self._shared or self._unused or self._lent() or self._unchanged()
        if model is None:
            model = self._load()
            # Of a sharded one a copy is read, and when it goes itself is a matter of chance, on each rank another.
            self._lent = weakref.ref(model) if self._ranks.world_size == 1 else _nothing
        return model

    def adapted_model(self, folder: Path) -> PreTrainedModel:
        """The base model with an adapter, for reading. It never changes.

        Raises:
            InvalidArgumentError: INVALID_FIELD: it is no LoRA of this model.
        """
        model = self._share(_READERS, lambda base: self._loaded(base, folder)).model
        return model.requires_grad_(False)

    def full(self, run_id: str) -> RunState:
        """A run whose parameters all train; it shares nothing."""
        if not self._sharing:
            # This makes room for the run. Samplers that still use that copy keep it alive.
            self._shared = None
            if self._ranks.world_size > 1:
                free_cycles()
        model, self._unused = self._unused or self._load(), None
        if self._lent() is None and self._unchanged() is None:
            self._unchanged = weakref.ref(model)
        return self._run(run_id, model)

    def lora(self, run_id: str, settings: LoraSettings) -> RunState:
        """A run that trains a new adapter.

        Raises:
            InvalidArgumentError: INVALID_FIELD: a setting is out of range, or nothing would train.
        """
        lora.check_settings(settings, hidden_size=self._hidden_size)
        return self._share(
            run_id, lambda base: lora.new_adapter(base, self._targets, settings, base_model=self._base_model)
        )

    def from_adapter(self, run_id: str, folder: Path) -> RunState:
        """A run that continues to train an existing adapter.

        Raises:
            InvalidArgumentError: INVALID_FIELD: it is no LoRA of this model.
        """
        return self._share(run_id, lambda base: self._loaded(base, folder))

    def will_change(self, run: RunState) -> None:
        """Says that a run's parameters are about to change: its model is no longer the base model."""
        if self._unchanged() is run.model:
            self._unchanged = _nothing

    def merged(self, run: RunState) -> PreTrainedModel | MergedParts:
        """A model with the run's adapter in its weights."""
        assert self._shared is not None
        return lora.merged(self._shared, run.model)

    def deleted(self, run_id: str) -> None:
        """Says that a run is gone. The base model stays for the next, until a run that shares nothing needs room."""
        self._sharing.discard(run_id)

    def _share(self, run_id: str, make: Callable[[PreTrainedModel], PeftModel]) -> RunState:
        base = self._shared
        if base is None:
            base, self._unused = self._unused or self._lent() or self._load(), None
            lora.freeze(base)
            base = self._shared = self._for_adapters(base)
            if self._ranks.world_size > 1:
                free_cycles()
        self._sharing.add(run_id)
        try:
            adapter = make(base)
        except BaseException:
            self.deleted(run_id)
            raise
        model = lora.inner(adapter)
        adapted = {name for name, _ in adapted_weights(model)}
        left_out = {*self._targets.all, *self._targets.others} - adapted
        return self._run(
            run_id,
            model,
            adapter=adapter,
            lora=lora.settings_of(adapter, self._targets),
            adapted=tuple(starred(adapted)),
            left_out=tuple(starred(left_out)),
        )

    def _run(self, run_id: str, model: PreTrainedModel, **of_adapter: Any) -> RunState:
        # Looked up before anything runs: while parameters are gathered, others stand in their place.
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        return RunState(run_id, model, AdamW(trained.values(), self._ranks), trained, **of_adapter)

    def _loaded(self, base: PreTrainedModel, folder: Path) -> PeftModel:
        return load_adapter(base, self._targets, folder, base_model=self._base_model)
