from gradwire.v1 import checkpoint_pb2 as _checkpoint_pb2
from gradwire.v1 import datum_pb2 as _datum_pb2
from gradwire.v1 import tensor_pb2 as _tensor_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GradAccumulationNormalization(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    GRAD_ACCUMULATION_NORMALIZATION_UNSPECIFIED: _ClassVar[GradAccumulationNormalization]
    GRAD_ACCUMULATION_NORMALIZATION_NONE: _ClassVar[GradAccumulationNormalization]
    GRAD_ACCUMULATION_NORMALIZATION_NUM_LOSS_TOKENS: _ClassVar[GradAccumulationNormalization]
    GRAD_ACCUMULATION_NORMALIZATION_NUM_SEQUENCES: _ClassVar[GradAccumulationNormalization]
GRAD_ACCUMULATION_NORMALIZATION_UNSPECIFIED: GradAccumulationNormalization
GRAD_ACCUMULATION_NORMALIZATION_NONE: GradAccumulationNormalization
GRAD_ACCUMULATION_NORMALIZATION_NUM_LOSS_TOKENS: GradAccumulationNormalization
GRAD_ACCUMULATION_NORMALIZATION_NUM_SEQUENCES: GradAccumulationNormalization

class ForwardRequest(_message.Message):
    __slots__ = ("run_id", "seq_id", "data", "batch", "keep_graph", "loss_fn", "loss_fn_config")
    class LossFnConfigEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    KEEP_GRAPH_FIELD_NUMBER: _ClassVar[int]
    LOSS_FN_FIELD_NUMBER: _ClassVar[int]
    LOSS_FN_CONFIG_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    seq_id: int
    data: _containers.RepeatedCompositeFieldContainer[_datum_pb2.Datum]
    batch: _datum_pb2.DatumBatch
    keep_graph: bool
    loss_fn: str
    loss_fn_config: _containers.ScalarMap[str, float]
    def __init__(self, run_id: _Optional[str] = ..., seq_id: _Optional[int] = ..., data: _Optional[_Iterable[_Union[_datum_pb2.Datum, _Mapping]]] = ..., batch: _Optional[_Union[_datum_pb2.DatumBatch, _Mapping]] = ..., keep_graph: bool = ..., loss_fn: _Optional[str] = ..., loss_fn_config: _Optional[_Mapping[str, float]] = ...) -> None: ...

class ForwardResponse(_message.Message):
    __slots__ = ("loss_fn_outputs", "cu_seqlens", "metrics")
    class LossFnOutputsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _tensor_pb2.Tensor
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    LOSS_FN_OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    CU_SEQLENS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    loss_fn_outputs: _containers.MessageMap[str, _tensor_pb2.Tensor]
    cu_seqlens: _tensor_pb2.Tensor
    metrics: _containers.ScalarMap[str, float]
    def __init__(self, loss_fn_outputs: _Optional[_Mapping[str, _tensor_pb2.Tensor]] = ..., cu_seqlens: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., metrics: _Optional[_Mapping[str, float]] = ...) -> None: ...

class ForwardBackwardRequest(_message.Message):
    __slots__ = ("run_id", "seq_id", "data", "batch", "loss_fn", "loss_fn_config")
    class LossFnConfigEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    LOSS_FN_FIELD_NUMBER: _ClassVar[int]
    LOSS_FN_CONFIG_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    seq_id: int
    data: _containers.RepeatedCompositeFieldContainer[_datum_pb2.Datum]
    batch: _datum_pb2.DatumBatch
    loss_fn: str
    loss_fn_config: _containers.ScalarMap[str, float]
    def __init__(self, run_id: _Optional[str] = ..., seq_id: _Optional[int] = ..., data: _Optional[_Iterable[_Union[_datum_pb2.Datum, _Mapping]]] = ..., batch: _Optional[_Union[_datum_pb2.DatumBatch, _Mapping]] = ..., loss_fn: _Optional[str] = ..., loss_fn_config: _Optional[_Mapping[str, float]] = ...) -> None: ...

class ForwardBackwardResponse(_message.Message):
    __slots__ = ("loss_fn_outputs", "cu_seqlens", "metrics")
    class LossFnOutputsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: _tensor_pb2.Tensor
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ...) -> None: ...
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    LOSS_FN_OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    CU_SEQLENS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    loss_fn_outputs: _containers.MessageMap[str, _tensor_pb2.Tensor]
    cu_seqlens: _tensor_pb2.Tensor
    metrics: _containers.ScalarMap[str, float]
    def __init__(self, loss_fn_outputs: _Optional[_Mapping[str, _tensor_pb2.Tensor]] = ..., cu_seqlens: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., metrics: _Optional[_Mapping[str, float]] = ...) -> None: ...

class BackwardRequest(_message.Message):
    __slots__ = ("run_id", "seq_id", "forward_seq_id", "gradients", "metrics")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    FORWARD_SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    GRADIENTS_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    seq_id: int
    forward_seq_id: int
    gradients: _tensor_pb2.Tensor
    metrics: _containers.ScalarMap[str, float]
    def __init__(self, run_id: _Optional[str] = ..., seq_id: _Optional[int] = ..., forward_seq_id: _Optional[int] = ..., gradients: _Optional[_Union[_tensor_pb2.Tensor, _Mapping]] = ..., metrics: _Optional[_Mapping[str, float]] = ...) -> None: ...

class BackwardResponse(_message.Message):
    __slots__ = ("metrics",)
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    METRICS_FIELD_NUMBER: _ClassVar[int]
    metrics: _containers.ScalarMap[str, float]
    def __init__(self, metrics: _Optional[_Mapping[str, float]] = ...) -> None: ...

class OptimStepRequest(_message.Message):
    __slots__ = ("run_id", "seq_id", "learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm", "grad_accumulation_normalization")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    LEARNING_RATE_FIELD_NUMBER: _ClassVar[int]
    BETA1_FIELD_NUMBER: _ClassVar[int]
    BETA2_FIELD_NUMBER: _ClassVar[int]
    EPS_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_DECAY_FIELD_NUMBER: _ClassVar[int]
    GRAD_CLIP_NORM_FIELD_NUMBER: _ClassVar[int]
    GRAD_ACCUMULATION_NORMALIZATION_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    seq_id: int
    learning_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    grad_clip_norm: float
    grad_accumulation_normalization: GradAccumulationNormalization
    def __init__(self, run_id: _Optional[str] = ..., seq_id: _Optional[int] = ..., learning_rate: _Optional[float] = ..., beta1: _Optional[float] = ..., beta2: _Optional[float] = ..., eps: _Optional[float] = ..., weight_decay: _Optional[float] = ..., grad_clip_norm: _Optional[float] = ..., grad_accumulation_normalization: _Optional[_Union[GradAccumulationNormalization, str]] = ...) -> None: ...

class OptimStepResponse(_message.Message):
    __slots__ = ("step", "metrics")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    STEP_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    step: int
    metrics: _containers.ScalarMap[str, float]
    def __init__(self, step: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ...) -> None: ...

class ZeroGradRequest(_message.Message):
    __slots__ = ("run_id", "seq_id")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    seq_id: int
    def __init__(self, run_id: _Optional[str] = ..., seq_id: _Optional[int] = ...) -> None: ...

class ZeroGradResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CancelRequest(_message.Message):
    __slots__ = ("run_id", "seq_id", "forward_seq_ids", "taint")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    FORWARD_SEQ_IDS_FIELD_NUMBER: _ClassVar[int]
    TAINT_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    seq_id: int
    forward_seq_ids: _containers.RepeatedScalarFieldContainer[int]
    taint: bool
    def __init__(self, run_id: _Optional[str] = ..., seq_id: _Optional[int] = ..., forward_seq_ids: _Optional[_Iterable[int]] = ..., taint: bool = ...) -> None: ...

class CancelResponse(_message.Message):
    __slots__ = ("dropped",)
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    dropped: int
    def __init__(self, dropped: _Optional[int] = ...) -> None: ...

class SaveWeightsForSamplerRequest(_message.Message):
    __slots__ = ("run_id", "seq_id", "name", "overwrite", "ephemeral", "lease_ms", "merged", "checkpoint_type", "dtype", "ttl_seconds", "user_metadata")
    class UserMetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    OVERWRITE_FIELD_NUMBER: _ClassVar[int]
    EPHEMERAL_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    MERGED_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_TYPE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    TTL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    USER_METADATA_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    seq_id: int
    name: str
    overwrite: bool
    ephemeral: bool
    lease_ms: int
    merged: bool
    checkpoint_type: _checkpoint_pb2.CheckpointType
    dtype: str
    ttl_seconds: int
    user_metadata: _containers.ScalarMap[str, str]
    def __init__(self, run_id: _Optional[str] = ..., seq_id: _Optional[int] = ..., name: _Optional[str] = ..., overwrite: bool = ..., ephemeral: bool = ..., lease_ms: _Optional[int] = ..., merged: bool = ..., checkpoint_type: _Optional[_Union[_checkpoint_pb2.CheckpointType, str]] = ..., dtype: _Optional[str] = ..., ttl_seconds: _Optional[int] = ..., user_metadata: _Optional[_Mapping[str, str]] = ...) -> None: ...

class SaveWeightsForSamplerResponse(_message.Message):
    __slots__ = ("path", "uri", "size_bytes")
    PATH_FIELD_NUMBER: _ClassVar[int]
    URI_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    path: str
    uri: str
    size_bytes: int
    def __init__(self, path: _Optional[str] = ..., uri: _Optional[str] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class SaveStateRequest(_message.Message):
    __slots__ = ("run_id", "seq_id", "name", "overwrite", "ttl_seconds", "user_metadata")
    class UserMetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    OVERWRITE_FIELD_NUMBER: _ClassVar[int]
    TTL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    USER_METADATA_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    seq_id: int
    name: str
    overwrite: bool
    ttl_seconds: int
    user_metadata: _containers.ScalarMap[str, str]
    def __init__(self, run_id: _Optional[str] = ..., seq_id: _Optional[int] = ..., name: _Optional[str] = ..., overwrite: bool = ..., ttl_seconds: _Optional[int] = ..., user_metadata: _Optional[_Mapping[str, str]] = ...) -> None: ...

class SaveStateResponse(_message.Message):
    __slots__ = ("path", "size_bytes")
    PATH_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    path: str
    size_bytes: int
    def __init__(self, path: _Optional[str] = ..., size_bytes: _Optional[int] = ...) -> None: ...

class LoadStateRequest(_message.Message):
    __slots__ = ("run_id", "seq_id", "path", "with_optimizer")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    WITH_OPTIMIZER_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    seq_id: int
    path: str
    with_optimizer: bool
    def __init__(self, run_id: _Optional[str] = ..., seq_id: _Optional[int] = ..., path: _Optional[str] = ..., with_optimizer: bool = ...) -> None: ...

class LoadStateResponse(_message.Message):
    __slots__ = ("step",)
    STEP_FIELD_NUMBER: _ClassVar[int]
    step: int
    def __init__(self, step: _Optional[int] = ...) -> None: ...
