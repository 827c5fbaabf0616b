"""What a run is, and what a trainer serves, as plain values."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime


@dataclass(frozen=True)
class ModelData:
    """The model of a run."""

    model_name: str
    """The base model, as the trainer calls it."""
    arch: str
    """Architecture, such as "LlamaForCausalLM"."""
    tokenizer_id: str
    """Whose tokenizer it is: the base model's. get_tokenizer() needs no name."""


@dataclass(frozen=True)
class ListedRun:
    """A run in the answer to list_runs()."""

    run_id: str
    """Identifier, unique on its trainer."""
    base_model: str
    """The model it started from, as the trainer was given it."""
    lora_rank: int
    """Rank of its adapter; 0 where all parameters train."""
    state: str
    """"active" or "lost": it could not be restored, and takes no more operations."""
    step: int
    """Number of optimizer steps applied."""
    created_at: datetime
    """When it was created, UTC."""
    display_name: str
    """The name its owner gave it; may be empty."""
    attached: bool
    """Whether a client drives it now."""
    user_metadata: Mapping[str, str]
    """What its owner wrote about it."""


@dataclass(frozen=True)
class LoraLayout:
    """What the adapter of a LoRA run adapts."""

    lora_alpha: float
    """The adapter is scaled by lora_alpha / lora_rank."""
    train_mlp: bool
    """Whether all feed-forward layers have an adapter, experts among them. False where the model has none."""
    train_attn: bool
    """Whether all of attention has one, and what mixes tokens in its place. False where the model has none."""
    train_unembed: bool
    """Whether the head, the layer that makes logits, has one."""
    adapted: tuple[str, ...]
    """What has an adapter, by its name in the model with * for the numbers of layers."""
    left_out: tuple[str, ...]
    """Matrices that have none, likewise, but for tables of embeddings."""


@dataclass(frozen=True)
class RunInfo:
    """What a run is and where it stands."""

    run_id: str
    """Identifier, unique on its trainer."""
    base_model: str
    """The model it started from, as the trainer was given it."""
    lora_rank: int
    """Rank of its adapter; 0 where all parameters train."""
    step: int
    """Number of optimizer steps applied."""
    state: str
    """"active" or "lost": it could not be restored, and takes no more operations."""
    vocab_size: int
    """Number of token ids; ids are below it."""
    max_context_length: int
    """Longest sequence taken, tokens."""
    num_parameters: int
    """Number of the model's parameters."""
    architecture: str = ""
    """Such as "LlamaForCausalLM"."""
    display_name: str = ""
    """The name its owner gave it; may be empty."""
    user_metadata: Mapping[str, str] = field(default_factory=dict)
    """What its owner wrote about it."""
    lora: LoraLayout | None = None
    """What its adapter adapts; None where all parameters train."""

    @property
    def model_name(self) -> str:
        """The base model's name."""
        return self.base_model

    @property
    def model_id(self) -> str:
        """The run's id."""
        return self.run_id

    @property
    def is_lora(self) -> bool:
        """Whether only an adapter trains."""
        return self.lora_rank > 0

    @property
    def model_data(self) -> ModelData:
        """The model of the run."""
        return ModelData(model_name=self.base_model, arch=self.architecture, tokenizer_id=self.base_model)


@dataclass(frozen=True)
class SupportedModel:
    """A model that a trainer serves."""

    model_name: str
    """A name that base_model may be: what the trainer calls it, or an alias."""
    max_context_length: int
    """Longest sequence taken, tokens."""
    trainable: bool = True
    """Always: it can be trained."""
    sampleable: bool = True
    """Always: it can be sampled from."""


@dataclass(frozen=True)
class ServerCapabilities:
    """What a trainer can do; get_server_info() says more."""

    supported_models: list[SupportedModel]
    """The one model it serves, by each of its names."""
