"""What a trainer says of itself: its versions, model, losses and limits."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Mesh:
    """A worker's processes (ranks), by torch's names."""

    world_size: int = 1
    """Ranks in all."""
    local_world_size: int = 1
    """Ranks on each machine."""
    nnodes: int = 1
    """Machines (nodes)."""
    fsdp_size: int = 1
    """Ranks that parameters are in parts on, each its part; 1: whole."""
    dp_replicate_size: int = 1
    """Times that all parts are there, on as many ranks each time; batches are dealt out to fsdp_size times this."""
    tp_size: int = 1
    """Ranks that compute each layer together; fsdp_size times dp_replicate_size times this is world_size."""
    ep_size: int = 1
    """Of the fsdp_size ranks, those that divide routed experts among them."""


@dataclass(frozen=True)
class ModelInfo:
    """A model that a trainer serves."""

    base_model: str
    """What it is called: the served name, or the hub id or folder that the trainer was given."""
    architecture: str
    """Such as "LlamaForCausalLM"."""
    vocab_size: int
    """Number of token ids; ids are below it."""
    max_context_length: int
    """Longest sequence taken, tokens: the model's own limit or the trainer's, whichever is less."""
    num_parameters: int
    """Number of parameters."""
    dtype: str
    """Type of the parameters, such as "float32"."""
    device: str
    """Where it runs, such as "cpu" or "cuda:0 (NVIDIA H200)"."""
    batching: str
    """How datums become microbatches, such as "one sequence at a time"."""
    sampling: str
    """How samples are decoded, such as "together", or in which other way and why."""
    aliases: tuple[str, ...] = ()
    """Further names that it may be given."""
    mesh: Mesh = Mesh()
    """How the worker's processes share it; the same for every run."""


@dataclass(frozen=True)
class LossInfo:
    """A built-in loss."""

    name: str
    """What `loss_fn` of forward and forward_backward takes."""
    loss_fn_inputs: tuple[str, ...]
    """Per-token inputs it needs beside target_tokens."""
    loss_fn_config_keys: tuple[str, ...]
    """Settings that `loss_fn_config` may have."""
    loss_fn_config_defaults: Mapping[str, float]
    """Their defaults by key; a key without one must be given."""
    soft_targets: bool
    """Whether it also takes K soft targets a token, inputs of shape [N, K]."""


@dataclass(frozen=True)
class Limits:
    """The most that a trainer takes; 0 where a trainer of another version does not say."""

    max_message_bytes: int
    """One message, either way, bytes."""
    target_message_bytes: int
    """The size at which the SDK splits batches, bytes."""
    max_in_flight_operations: int
    """Operations of one run that are sent and not yet answered."""
    max_runs: int
    """Runs held at once."""
    max_datums: int
    """Datums in one operation."""
    max_tokens: int
    """Tokens in one operation."""
    max_num_samples: int
    """Samples of one request."""
    max_topk_logprobs: int
    """Likeliest tokens asked for at one place."""
    max_sample_requests: int
    """Sampling requests under way at once, of all clients together."""
    max_frozen_weights: int
    """Sets of frozen weights that one run may have at once."""
    max_user_metadata_entries: int
    """Entries of one user_metadata."""
    max_user_metadata_bytes: int
    """Keys and values of one user_metadata together, UTF-8 bytes; a key has at most 128, a value 4,096."""
    max_message_fields: int
    """Fields of one message, nested ones and entries of maps and unpacked lists included."""
    max_name_bytes: int
    """One name, identifier or path, UTF-8 bytes; keys of maps are names."""
    max_loss_fn_inputs: int
    """Entries of one datum's loss_fn_inputs."""
    max_loss_fn_config_keys: int
    """Entries of loss_fn_config."""
    max_forward_seq_ids: int
    """Forwards that one cancel names."""
    max_typed_datums: int
    """Datums in one operation that is typed by hand."""
    max_typed_values: int
    """Elements of one tensor that is typed by hand."""
    max_tensor_dims: int
    """Dims of one tensor."""
    max_prompt_text_bytes: int
    """One prompt given as text, UTF-8 bytes; a prompt of tokens may fill the context."""
    max_stop_token_ids: int
    """Token ids in `stop`."""
    max_stop_strings: int
    """Texts in `stop`."""
    max_stop_string_bytes: int
    """One of these texts, UTF-8 bytes."""
    max_stop_bytes: int
    """All of these texts together, UTF-8 bytes."""
    max_metrics: int
    """Metrics of one custom loss, or names asked for in one call of `metrics`."""


@dataclass(frozen=True)
class ServerInfo:
    """A trainer's answer to get_server_info()."""

    software_version: str
    """Version of the trainer's gradwire."""
    min_protocol_version: int
    """Oldest protocol version it speaks."""
    max_protocol_version: int
    """Newest protocol version it speaks."""
    models: tuple[ModelInfo, ...]
    """The models it serves, which is one; empty until its worker has loaded it."""
    losses: tuple[LossInfo, ...]
    """Its built-in losses; empty until its worker has loaded the model."""
    limits: Limits
    """The most it takes."""
    ready: bool
    """Whether the model is loaded, its worker responds and it takes work."""
    status_message: str
    """What it does while it is not ready, or why it cannot be, in a sentence."""
