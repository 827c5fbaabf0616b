"""What a run is, and what a trainer serves, as plain values."""

from collections.abc import Mapping
from dataclasses import dataclass, field


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
class RunInfo:
    """What a run is and where it stands."""

    run_id: str
    base_model: str
    lora_rank: int
    step: int
    """Number of optimizer steps applied."""
    state: str
    """"active" or "lost"."""
    vocab_size: int
    max_context_length: int
    """Longest sequence taken, tokens."""
    num_parameters: int
    architecture: str = ""
    """Such as "LlamaForCausalLM"."""
    display_name: str = ""
    """The name its owner gave it."""
    user_metadata: Mapping[str, str] = field(default_factory=dict)
    """What its owner wrote about it."""

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
        """Its model."""
        return ModelData(model_name=self.base_model, arch=self.architecture, tokenizer_id=self.base_model)


@dataclass(frozen=True)
class SupportedModel:
    """A model that a trainer serves."""

    model_name: str
    """A name that base_model may be: what the trainer calls it, or an alias."""
    max_context_length: int
    """Longest sequence taken, tokens."""
    trainable: bool = True
    sampleable: bool = True


@dataclass(frozen=True)
class ServerCapabilities:
    """What a trainer can do; get_server_info() says more."""

    supported_models: list[SupportedModel]
    """The one model it serves, by each of its names."""
