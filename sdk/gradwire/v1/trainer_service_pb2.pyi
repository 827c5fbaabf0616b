from google.rpc import status_pb2 as _status_pb2
from gradwire.v1 import operation_pb2 as _operation_pb2
from gradwire.v1 import run_pb2 as _run_pb2
from gradwire.v1 import run_metrics_pb2 as _run_metrics_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LossInfo(_message.Message):
    __slots__ = ("name", "loss_fn_inputs", "loss_fn_config_keys", "loss_fn_config_defaults", "soft_targets")
    class LossFnConfigDefaultsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    LOSS_FN_INPUTS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FN_CONFIG_KEYS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FN_CONFIG_DEFAULTS_FIELD_NUMBER: _ClassVar[int]
    SOFT_TARGETS_FIELD_NUMBER: _ClassVar[int]
    name: str
    loss_fn_inputs: _containers.RepeatedScalarFieldContainer[str]
    loss_fn_config_keys: _containers.RepeatedScalarFieldContainer[str]
    loss_fn_config_defaults: _containers.ScalarMap[str, float]
    soft_targets: bool
    def __init__(self, name: _Optional[str] = ..., loss_fn_inputs: _Optional[_Iterable[str]] = ..., loss_fn_config_keys: _Optional[_Iterable[str]] = ..., loss_fn_config_defaults: _Optional[_Mapping[str, float]] = ..., soft_targets: bool = ...) -> None: ...

class Mesh(_message.Message):
    __slots__ = ("world_size", "local_world_size", "nnodes", "fsdp_size", "dp_replicate_size", "tp_size", "ep_size")
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    LOCAL_WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    NNODES_FIELD_NUMBER: _ClassVar[int]
    FSDP_SIZE_FIELD_NUMBER: _ClassVar[int]
    DP_REPLICATE_SIZE_FIELD_NUMBER: _ClassVar[int]
    TP_SIZE_FIELD_NUMBER: _ClassVar[int]
    EP_SIZE_FIELD_NUMBER: _ClassVar[int]
    world_size: int
    local_world_size: int
    nnodes: int
    fsdp_size: int
    dp_replicate_size: int
    tp_size: int
    ep_size: int
    def __init__(self, world_size: _Optional[int] = ..., local_world_size: _Optional[int] = ..., nnodes: _Optional[int] = ..., fsdp_size: _Optional[int] = ..., dp_replicate_size: _Optional[int] = ..., tp_size: _Optional[int] = ..., ep_size: _Optional[int] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("base_model", "architecture", "vocab_size", "max_context_length", "num_parameters", "dtype", "device", "batching", "sampling", "aliases", "mesh")
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    NUM_PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    BATCHING_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    ALIASES_FIELD_NUMBER: _ClassVar[int]
    MESH_FIELD_NUMBER: _ClassVar[int]
    base_model: str
    architecture: str
    vocab_size: int
    max_context_length: int
    num_parameters: int
    dtype: str
    device: str
    batching: str
    sampling: str
    aliases: _containers.RepeatedScalarFieldContainer[str]
    mesh: Mesh
    def __init__(self, base_model: _Optional[str] = ..., architecture: _Optional[str] = ..., vocab_size: _Optional[int] = ..., max_context_length: _Optional[int] = ..., num_parameters: _Optional[int] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., batching: _Optional[str] = ..., sampling: _Optional[str] = ..., aliases: _Optional[_Iterable[str]] = ..., mesh: _Optional[_Union[Mesh, _Mapping]] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_message_bytes", "target_message_bytes", "max_in_flight_operations", "max_runs", "max_datums", "max_tokens", "max_num_samples", "max_topk_logprobs", "max_sample_requests", "max_frozen_weights", "max_user_metadata_entries", "max_user_metadata_bytes", "max_message_fields", "max_name_bytes", "max_loss_fn_inputs", "max_loss_fn_config_keys", "max_forward_seq_ids", "max_typed_datums", "max_typed_values", "max_tensor_dims", "max_prompt_text_bytes", "max_stop_token_ids", "max_stop_strings", "max_stop_string_bytes", "max_stop_bytes", "max_metrics")
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    TARGET_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_IN_FLIGHT_OPERATIONS_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNS_FIELD_NUMBER: _ClassVar[int]
    MAX_DATUMS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_NUM_SAMPLES_FIELD_NUMBER: _ClassVar[int]
    MAX_TOPK_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    MAX_SAMPLE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_FROZEN_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    MAX_USER_METADATA_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    MAX_USER_METADATA_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_MESSAGE_FIELDS_FIELD_NUMBER: _ClassVar[int]
    MAX_NAME_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_LOSS_FN_INPUTS_FIELD_NUMBER: _ClassVar[int]
    MAX_LOSS_FN_CONFIG_KEYS_FIELD_NUMBER: _ClassVar[int]
    MAX_FORWARD_SEQ_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_TYPED_DATUMS_FIELD_NUMBER: _ClassVar[int]
    MAX_TYPED_VALUES_FIELD_NUMBER: _ClassVar[int]
    MAX_TENSOR_DIMS_FIELD_NUMBER: _ClassVar[int]
    MAX_PROMPT_TEXT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_STOP_STRINGS_FIELD_NUMBER: _ClassVar[int]
    MAX_STOP_STRING_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_STOP_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_METRICS_FIELD_NUMBER: _ClassVar[int]
    max_message_bytes: int
    target_message_bytes: int
    max_in_flight_operations: int
    max_runs: int
    max_datums: int
    max_tokens: int
    max_num_samples: int
    max_topk_logprobs: int
    max_sample_requests: int
    max_frozen_weights: int
    max_user_metadata_entries: int
    max_user_metadata_bytes: int
    max_message_fields: int
    max_name_bytes: int
    max_loss_fn_inputs: int
    max_loss_fn_config_keys: int
    max_forward_seq_ids: int
    max_typed_datums: int
    max_typed_values: int
    max_tensor_dims: int
    max_prompt_text_bytes: int
    max_stop_token_ids: int
    max_stop_strings: int
    max_stop_string_bytes: int
    max_stop_bytes: int
    max_metrics: int
    def __init__(self, max_message_bytes: _Optional[int] = ..., target_message_bytes: _Optional[int] = ..., max_in_flight_operations: _Optional[int] = ..., max_runs: _Optional[int] = ..., max_datums: _Optional[int] = ..., max_tokens: _Optional[int] = ..., max_num_samples: _Optional[int] = ..., max_topk_logprobs: _Optional[int] = ..., max_sample_requests: _Optional[int] = ..., max_frozen_weights: _Optional[int] = ..., max_user_metadata_entries: _Optional[int] = ..., max_user_metadata_bytes: _Optional[int] = ..., max_message_fields: _Optional[int] = ..., max_name_bytes: _Optional[int] = ..., max_loss_fn_inputs: _Optional[int] = ..., max_loss_fn_config_keys: _Optional[int] = ..., max_forward_seq_ids: _Optional[int] = ..., max_typed_datums: _Optional[int] = ..., max_typed_values: _Optional[int] = ..., max_tensor_dims: _Optional[int] = ..., max_prompt_text_bytes: _Optional[int] = ..., max_stop_token_ids: _Optional[int] = ..., max_stop_strings: _Optional[int] = ..., max_stop_string_bytes: _Optional[int] = ..., max_stop_bytes: _Optional[int] = ..., max_metrics: _Optional[int] = ...) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("software_version", "min_protocol_version", "max_protocol_version", "models", "losses", "limits", "ready", "status_message")
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    MIN_PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MAX_PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    STATUS_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    software_version: str
    min_protocol_version: int
    max_protocol_version: int
    models: _containers.RepeatedCompositeFieldContainer[ModelInfo]
    losses: _containers.RepeatedCompositeFieldContainer[LossInfo]
    limits: Limits
    ready: bool
    status_message: str
    def __init__(self, software_version: _Optional[str] = ..., min_protocol_version: _Optional[int] = ..., max_protocol_version: _Optional[int] = ..., models: _Optional[_Iterable[_Union[ModelInfo, _Mapping]]] = ..., losses: _Optional[_Iterable[_Union[LossInfo, _Mapping]]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., ready: bool = ..., status_message: _Optional[str] = ...) -> None: ...

class CreateRunRequest(_message.Message):
    __slots__ = ("request_id", "base_model", "lora_rank", "display_name", "lora_alpha", "seed", "train_mlp", "train_attn", "train_unembed", "adapter_path", "user_metadata")
    class UserMetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    LORA_RANK_FIELD_NUMBER: _ClassVar[int]
    DISPLAY_NAME_FIELD_NUMBER: _ClassVar[int]
    LORA_ALPHA_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    TRAIN_MLP_FIELD_NUMBER: _ClassVar[int]
    TRAIN_ATTN_FIELD_NUMBER: _ClassVar[int]
    TRAIN_UNEMBED_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_PATH_FIELD_NUMBER: _ClassVar[int]
    USER_METADATA_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    base_model: str
    lora_rank: int
    display_name: str
    lora_alpha: float
    seed: int
    train_mlp: bool
    train_attn: bool
    train_unembed: bool
    adapter_path: str
    user_metadata: _containers.ScalarMap[str, str]
    def __init__(self, request_id: _Optional[str] = ..., base_model: _Optional[str] = ..., lora_rank: _Optional[int] = ..., display_name: _Optional[str] = ..., lora_alpha: _Optional[float] = ..., seed: _Optional[int] = ..., train_mlp: bool = ..., train_attn: bool = ..., train_unembed: bool = ..., adapter_path: _Optional[str] = ..., user_metadata: _Optional[_Mapping[str, str]] = ...) -> None: ...

class CreateRunResponse(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: _run_pb2.Run
    def __init__(self, run: _Optional[_Union[_run_pb2.Run, _Mapping]] = ...) -> None: ...

class GetRunRequest(_message.Message):
    __slots__ = ("run_id",)
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    def __init__(self, run_id: _Optional[str] = ...) -> None: ...

class GetRunResponse(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: _run_pb2.Run
    def __init__(self, run: _Optional[_Union[_run_pb2.Run, _Mapping]] = ...) -> None: ...

class ListRunsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListRunsResponse(_message.Message):
    __slots__ = ("runs",)
    RUNS_FIELD_NUMBER: _ClassVar[int]
    runs: _containers.RepeatedCompositeFieldContainer[_run_pb2.Run]
    def __init__(self, runs: _Optional[_Iterable[_Union[_run_pb2.Run, _Mapping]]] = ...) -> None: ...

class DeleteRunRequest(_message.Message):
    __slots__ = ("run_id",)
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    def __init__(self, run_id: _Optional[str] = ...) -> None: ...

class DeleteRunResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetTokenizerRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TokenizerFile(_message.Message):
    __slots__ = ("name", "size_bytes", "sha256")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHA256_FIELD_NUMBER: _ClassVar[int]
    name: str
    size_bytes: int
    sha256: str
    def __init__(self, name: _Optional[str] = ..., size_bytes: _Optional[int] = ..., sha256: _Optional[str] = ...) -> None: ...

class GetTokenizerResponse(_message.Message):
    __slots__ = ("files",)
    FILES_FIELD_NUMBER: _ClassVar[int]
    files: _containers.RepeatedCompositeFieldContainer[TokenizerFile]
    def __init__(self, files: _Optional[_Iterable[_Union[TokenizerFile, _Mapping]]] = ...) -> None: ...

class DownloadTokenizerRequest(_message.Message):
    __slots__ = ("file",)
    FILE_FIELD_NUMBER: _ClassVar[int]
    file: str
    def __init__(self, file: _Optional[str] = ...) -> None: ...

class DownloadTokenizerResponse(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class ForkRunRequest(_message.Message):
    __slots__ = ("run_id", "step", "request_id", "display_name")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    DISPLAY_NAME_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    step: int
    request_id: str
    display_name: str
    def __init__(self, run_id: _Optional[str] = ..., step: _Optional[int] = ..., request_id: _Optional[str] = ..., display_name: _Optional[str] = ...) -> None: ...

class ForkRunResponse(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: _run_pb2.Run
    def __init__(self, run: _Optional[_Union[_run_pb2.Run, _Mapping]] = ...) -> None: ...

class ReplayRunRequest(_message.Message):
    __slots__ = ("run_id",)
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    def __init__(self, run_id: _Optional[str] = ...) -> None: ...

class ReplayDifference(_message.Message):
    __slots__ = ("seq_id", "kind", "step", "recorded_digest", "replayed_digest")
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    RECORDED_DIGEST_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_DIGEST_FIELD_NUMBER: _ClassVar[int]
    seq_id: int
    kind: str
    step: int
    recorded_digest: str
    replayed_digest: str
    def __init__(self, seq_id: _Optional[int] = ..., kind: _Optional[str] = ..., step: _Optional[int] = ..., recorded_digest: _Optional[str] = ..., replayed_digest: _Optional[str] = ...) -> None: ...

class GetAnswerRequest(_message.Message):
    __slots__ = ("run_id", "seq_id", "timeout_ms")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    seq_id: int
    timeout_ms: int
    def __init__(self, run_id: _Optional[str] = ..., seq_id: _Optional[int] = ..., timeout_ms: _Optional[int] = ...) -> None: ...

class GetAnswerResponse(_message.Message):
    __slots__ = ("response", "pending")
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    response: TrainResponse
    pending: bool
    def __init__(self, response: _Optional[_Union[TrainResponse, _Mapping]] = ..., pending: bool = ...) -> None: ...

class ReplayRunResponse(_message.Message):
    __slots__ = ("after_seq_id", "compared", "not_compared", "difference")
    AFTER_SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    COMPARED_FIELD_NUMBER: _ClassVar[int]
    NOT_COMPARED_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
    after_seq_id: int
    compared: int
    not_compared: int
    difference: ReplayDifference
    def __init__(self, after_seq_id: _Optional[int] = ..., compared: _Optional[int] = ..., not_compared: _Optional[int] = ..., difference: _Optional[_Union[ReplayDifference, _Mapping]] = ...) -> None: ...

class AttachRequest(_message.Message):
    __slots__ = ("run_id", "client_id")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    CLIENT_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    client_id: str
    def __init__(self, run_id: _Optional[str] = ..., client_id: _Optional[str] = ...) -> None: ...

class AttachResponse(_message.Message):
    __slots__ = ("next_seq_id", "step")
    NEXT_SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    next_seq_id: int
    step: int
    def __init__(self, next_seq_id: _Optional[int] = ..., step: _Optional[int] = ...) -> None: ...

class TrainRequest(_message.Message):
    __slots__ = ("seq_id", "acked_seq_id", "attach", "forward", "forward_backward", "backward", "optim_step", "zero_grad", "cancel", "save_weights_for_sampler", "save_state", "load_state", "traceparent", "tracestate")
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    ACKED_SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    ATTACH_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    FORWARD_BACKWARD_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_FIELD_NUMBER: _ClassVar[int]
    OPTIM_STEP_FIELD_NUMBER: _ClassVar[int]
    ZERO_GRAD_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    SAVE_WEIGHTS_FOR_SAMPLER_FIELD_NUMBER: _ClassVar[int]
    SAVE_STATE_FIELD_NUMBER: _ClassVar[int]
    LOAD_STATE_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    TRACESTATE_FIELD_NUMBER: _ClassVar[int]
    seq_id: int
    acked_seq_id: int
    attach: AttachRequest
    forward: _operation_pb2.ForwardRequest
    forward_backward: _operation_pb2.ForwardBackwardRequest
    backward: _operation_pb2.BackwardRequest
    optim_step: _operation_pb2.OptimStepRequest
    zero_grad: _operation_pb2.ZeroGradRequest
    cancel: _operation_pb2.CancelRequest
    save_weights_for_sampler: _operation_pb2.SaveWeightsForSamplerRequest
    save_state: _operation_pb2.SaveStateRequest
    load_state: _operation_pb2.LoadStateRequest
    traceparent: str
    tracestate: str
    def __init__(self, seq_id: _Optional[int] = ..., acked_seq_id: _Optional[int] = ..., attach: _Optional[_Union[AttachRequest, _Mapping]] = ..., forward: _Optional[_Union[_operation_pb2.ForwardRequest, _Mapping]] = ..., forward_backward: _Optional[_Union[_operation_pb2.ForwardBackwardRequest, _Mapping]] = ..., backward: _Optional[_Union[_operation_pb2.BackwardRequest, _Mapping]] = ..., optim_step: _Optional[_Union[_operation_pb2.OptimStepRequest, _Mapping]] = ..., zero_grad: _Optional[_Union[_operation_pb2.ZeroGradRequest, _Mapping]] = ..., cancel: _Optional[_Union[_operation_pb2.CancelRequest, _Mapping]] = ..., save_weights_for_sampler: _Optional[_Union[_operation_pb2.SaveWeightsForSamplerRequest, _Mapping]] = ..., save_state: _Optional[_Union[_operation_pb2.SaveStateRequest, _Mapping]] = ..., load_state: _Optional[_Union[_operation_pb2.LoadStateRequest, _Mapping]] = ..., traceparent: _Optional[str] = ..., tracestate: _Optional[str] = ...) -> None: ...

class TrainResponse(_message.Message):
    __slots__ = ("seq_id", "queue_ms", "execute_ms", "transfer_ms", "error", "attached", "forward", "forward_backward", "backward", "optim_step", "zero_grad", "cancel", "save_weights_for_sampler", "save_state", "load_state")
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    EXECUTE_MS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_MS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    ATTACHED_FIELD_NUMBER: _ClassVar[int]
    FORWARD_FIELD_NUMBER: _ClassVar[int]
    FORWARD_BACKWARD_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_FIELD_NUMBER: _ClassVar[int]
    OPTIM_STEP_FIELD_NUMBER: _ClassVar[int]
    ZERO_GRAD_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    SAVE_WEIGHTS_FOR_SAMPLER_FIELD_NUMBER: _ClassVar[int]
    SAVE_STATE_FIELD_NUMBER: _ClassVar[int]
    LOAD_STATE_FIELD_NUMBER: _ClassVar[int]
    seq_id: int
    queue_ms: float
    execute_ms: float
    transfer_ms: float
    error: _status_pb2.Status
    attached: AttachResponse
    forward: _operation_pb2.ForwardResponse
    forward_backward: _operation_pb2.ForwardBackwardResponse
    backward: _operation_pb2.BackwardResponse
    optim_step: _operation_pb2.OptimStepResponse
    zero_grad: _operation_pb2.ZeroGradResponse
    cancel: _operation_pb2.CancelResponse
    save_weights_for_sampler: _operation_pb2.SaveWeightsForSamplerResponse
    save_state: _operation_pb2.SaveStateResponse
    load_state: _operation_pb2.LoadStateResponse
    def __init__(self, seq_id: _Optional[int] = ..., queue_ms: _Optional[float] = ..., execute_ms: _Optional[float] = ..., transfer_ms: _Optional[float] = ..., error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., attached: _Optional[_Union[AttachResponse, _Mapping]] = ..., forward: _Optional[_Union[_operation_pb2.ForwardResponse, _Mapping]] = ..., forward_backward: _Optional[_Union[_operation_pb2.ForwardBackwardResponse, _Mapping]] = ..., backward: _Optional[_Union[_operation_pb2.BackwardResponse, _Mapping]] = ..., optim_step: _Optional[_Union[_operation_pb2.OptimStepResponse, _Mapping]] = ..., zero_grad: _Optional[_Union[_operation_pb2.ZeroGradResponse, _Mapping]] = ..., cancel: _Optional[_Union[_operation_pb2.CancelResponse, _Mapping]] = ..., save_weights_for_sampler: _Optional[_Union[_operation_pb2.SaveWeightsForSamplerResponse, _Mapping]] = ..., save_state: _Optional[_Union[_operation_pb2.SaveStateResponse, _Mapping]] = ..., load_state: _Optional[_Union[_operation_pb2.LoadStateResponse, _Mapping]] = ...) -> None: ...
