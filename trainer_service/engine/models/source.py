"""Where a worker's models come from: read from the base model's folder, whole or in parts, ready to be run."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gradwire.errors import invalid_field
from transformers import AutoConfig, PreTrainedModel

from trainer_service import model_folder
from trainer_service.engine.device import Device
from trainer_service.engine.findings import Findings
from trainer_service.engine.fused.linear import add_in_place
from trainer_service.engine.models import runner
from trainer_service.engine.models.cut_trial import why_not_cut
from trainer_service.engine.models.experts import GROUPED, use_experts
from trainer_service.engine.models.load import load_model
from trainer_service.engine.models.positions import Boundary
from trainer_service.engine.models.probe import find_traits
from trainer_service.engine.models.runner import HeadTraits, Traits, prepare
from trainer_service.engine.packed import attention
from trainer_service.engine.parallel.expert_parallel import check_experts, expert_parallel, refused
from trainer_service.engine.parallel.sharding import Sharded
from trainer_service.engine.parallel.tensor_parallel import tensor_parallel
from trainer_service.engine.rank_channels import Ranks

_FEWEST_LAYERS = 2


class ModelSource:
    """Reads one base model. Where there are several ranks all of them call the same methods at the same time.

    Args:
        base_model: What it is called in refusals.
        folder: Where its files are.
        device: Where models go.
        ranks: Who shares the model.
        findings_folder: Of one trainer, private to its user, for what is found out by trying the model; None keeps
            nothing.

    Raises:
        InvalidArgumentError: The model cannot be loaded.
    """

    def __init__(
        self, base_model: str, folder: Path, device: Device, ranks: Ranks, findings_folder: Path | None = None
    ) -> None:
        self._base_model = base_model
        self._folder = folder
        self._device = device
        self._ranks = ranks
        self._first: PreTrainedModel | Sharded | None = self._read(base_model, folder)
        self.hollow = self._first.hollow if isinstance(self._first, Sharded) else None
        """The model without what its parameters hold, where they are in parts; None where they are whole."""
        self.findings = Findings(findings_folder, [model_folder.digest(folder)] if findings_folder else [])
        """Those that hold for the model as it is."""
        self._traits: Traits | None = None

    @property
    def example(self) -> PreTrainedModel:
        """A model to be described, which may be hollow. Where it is not, only before `load`."""
        found = self.hollow or self._first
        assert isinstance(found, PreTrainedModel)
        return found

    def find_traits(self, *, max_context_length: int) -> Traits:
        """What the architecture allows. Called once, before `load`."""
        device = self._device.torch_device
        if not isinstance(self._first, Sharded):
            first = self._first
            assert first is not None

            def find() -> tuple[Traits, bool]:
                return find_traits(first, device, max_context_length=max_context_length), attention.varlen_enabled

            made_of = Traits, HeadTraits, Boundary
            self._traits, attention.varlen_enabled = self.findings.recall("traits", find, made_of=made_of)
            return self._traits
        sibling, num_layers = self.sibling()
        self._check_parts(self._first, sibling)
        scale = num_layers / int(sibling.config.get_text_config().num_hidden_layers)
        traits = find_traits(sibling, device, max_context_length=max_context_length)
        found = replace(
            traits,
            held_bytes_per_token=int(traits.held_bytes_per_token * scale),
            checkpointed_bytes_per_token=int(traits.checkpointed_bytes_per_token * scale),
        )
        told = self._ranks.execution.tell({**asdict(found), "varlen": attention.varlen_enabled})
        attention.varlen_enabled = told.pop("varlen")
        head, turned = told.pop("head"), told.pop("boundaries")
        if self._ranks.ep_size > 1 and not told["experts"]:
            what = f"experts of {type(sibling).__name__} are computed in a way of their own, which ranks cannot divide"
            raise refused(self._ranks, what)
        self._check_cut(sibling, has_head=head is not None, attention_name=traits.attention)
        self._traits = Traits(
            **told,
            head=None if head is None else HeadTraits(**head),
            boundaries=tuple(Boundary(**one) for one in turned),
        )
        return self._traits

    def _check_parts(self, first: Sharded, sibling: PreTrainedModel) -> None:
        """Refuses a model of whose files ranks read wrong parts, as of matrices that the model splits.

        Args:
            first: As this rank has read it.
            sibling: See `sibling`.

        Raises:
            InvalidArgumentError: INVALID_FIELD.
        """
        wrong = next(filter(None, self._ranks.execution.gather(first.first_difference(sibling))), "")
        if wrong:
            raise invalid_field(
                "base_model",
                f"is a {type(sibling).__name__}, of whose {wrong} transformers gives ranks wrong parts; start the "
                "trainer with --nproc-per-node 1.",
            )

    def _check_cut(self, sibling: PreTrainedModel, *, has_head: bool, attention_name: str) -> None:
        """Refuses what ranks cannot compute layers of together.

        Args:
            sibling: See `sibling`. It is not to be used any more.
            has_head: Whether it is known how the model makes logits.
            attention_name: The implementation of attention it was loaded with.

        Raises:
            InvalidArgumentError: INVALID_FIELD.
        """
        if (group := tensor_parallel(self._ranks)) is None:
            return
        why = "makes logits in a way of its own, which ranks cannot divide"
        if has_head:
            found = why_not_cut(sibling, group, attention=attention_name)
            # Where another rank is gone, this fails, and the ranks start again.
            found = next(filter(None, self._ranks.execution.gather(found)), "")
            why = f"cut by transformers' plan is another model: {found}" if found else ""
        if why:
            text = f"is {group.size}, and a {type(sibling).__name__} {why}; start the trainer with --tp-size 1."
            raise invalid_field("tp_size", text)

    def load(self) -> PreTrainedModel:
        """A model of its own, prepared; the one that was read first, or one read anew."""
        assert self._traits is not None, "load before find_traits"
        first, self._first = self._first or self._read(self._base_model, self._folder), None
        if not isinstance(first, Sharded):
            prepare(first, self._traits)
            add_in_place(first)
            return first
        prepare(first.hollow, self._traits)
        return first.build()

    def read_parts(self, name: str, folder: Path) -> PreTrainedModel:
        """Another model, such as a checkpoint, in parts and frozen; there are several ranks."""
        found = self._read(name, folder)
        assert isinstance(found, Sharded)

        def change(hollow: PreTrainedModel) -> None:
            if self._ranks.ep_size > 1:
                # Another implementation would not ask the ranks that have them.
                use_experts(hollow, GROUPED)

        return found.frozen(change)

    def sibling(self) -> tuple[PreTrainedModel, int]:
        """The model with its first few layers, whole on this rank, and how many there really are.

        What it takes to try the architecture out: there is at least one layer of each kind.
        """
        config: Any = AutoConfig.from_pretrained(self._folder)
        text = config.get_text_config()
        total = int(text.num_hidden_layers)
        kept = few_layers(text)
        text.num_hidden_layers = kept
        for name, kinds in vars(text).items():
            if isinstance(kinds, list) and len(kinds) == total:
                setattr(text, name, kinds[:kept])
        model = load_model(self._base_model, self._folder, self._device, config=config)
        return model, total

    def _read(self, name: str, folder: Path) -> PreTrainedModel | Sharded:
        ranks = self._ranks
        loaded = load_model(
            name,
            folder,
            self._device,
            fsdp_size=ranks.fsdp_size,
            dp_replicate_size=ranks.dp_replicate_size,
            tp_size=ranks.tp_size,
            check=None if ranks.ep_size == 1 else lambda model: check_experts(model, ranks),
        )
        if ranks.world_size == 1:
            return loaded
        sharded = Sharded.of_loaded(
            loaded,
            device=self._device,
            forward=runner.forward,
            group=tensor_parallel(ranks),
            experts=expert_parallel(ranks),
        )
        sharded.limit_waiting(ranks.timeout_s)
        return sharded


def few_layers(config: Any) -> int:
    """How many of a model's first layers have one of each kind among them, two at least.

    Args:
        config: Of the text model.
    """
    total = int(config.num_hidden_layers)
    kinds = [value for value in vars(config).values() if isinstance(value, list) and len(value) == total]
    # DeepSeek's and its relatives' layers with experts come behind so many without.
    dense = int(getattr(config, "first_k_dense_replace", 0) or 0)
    kept = max(_FEWEST_LAYERS, dense + 1, int(getattr(config, "decoder_sparse_step", 1) or 1))
    for each in kinds:
        kept = max(kept, *(each.index(kind) + 1 for kind in each))
    return min(kept, total)
