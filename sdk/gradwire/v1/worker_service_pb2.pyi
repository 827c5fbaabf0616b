from google.rpc import status_pb2 as _status_pb2
from gradwire.v1 import sampling_service_pb2 as _sampling_service_pb2
from gradwire.v1 import trainer_service_pb2 as _trainer_service_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class WorkerHello(_message.Message):
    __slots__ = ("token", "pid", "mesh", "software_version")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    MESH_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    token: str
    pid: int
    mesh: _trainer_service_pb2.Mesh
    software_version: str
    def __init__(self, token: _Optional[str] = ..., pid: _Optional[int] = ..., mesh: _Optional[_Union[_trainer_service_pb2.Mesh, _Mapping]] = ..., software_version: _Optional[str] = ...) -> None: ...

class LoraTargets(_message.Message):
    __slots__ = ("attn", "mlp", "unembed", "others")
    ATTN_FIELD_NUMBER: _ClassVar[int]
    MLP_FIELD_NUMBER: _ClassVar[int]
    UNEMBED_FIELD_NUMBER: _ClassVar[int]
    OTHERS_FIELD_NUMBER: _ClassVar[int]
    attn: _containers.RepeatedScalarFieldContainer[str]
    mlp: _containers.RepeatedScalarFieldContainer[str]
    unembed: _containers.RepeatedScalarFieldContainer[str]
    others: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, attn: _Optional[_Iterable[str]] = ..., mlp: _Optional[_Iterable[str]] = ..., unembed: _Optional[_Iterable[str]] = ..., others: _Optional[_Iterable[str]] = ...) -> None: ...

class WorkerReady(_message.Message):
    __slots__ = ("model", "losses", "lora_targets", "model_folder")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LOSSES_FIELD_NUMBER: _ClassVar[int]
    LORA_TARGETS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FOLDER_FIELD_NUMBER: _ClassVar[int]
    model: _trainer_service_pb2.ModelInfo
    losses: _containers.RepeatedCompositeFieldContainer[_trainer_service_pb2.LossInfo]
    lora_targets: LoraTargets
    model_folder: str
    def __init__(self, model: _Optional[_Union[_trainer_service_pb2.ModelInfo, _Mapping]] = ..., losses: _Optional[_Iterable[_Union[_trainer_service_pb2.LossInfo, _Mapping]]] = ..., lora_targets: _Optional[_Union[LoraTargets, _Mapping]] = ..., model_folder: _Optional[str] = ...) -> None: ...

class WorkerHeartbeat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerDone(_message.Message):
    __slots__ = ("error",)
    ERROR_FIELD_NUMBER: _ClassVar[int]
    error: _status_pb2.Status
    def __init__(self, error: _Optional[_Union[_status_pb2.Status, _Mapping]] = ...) -> None: ...

class WorkerEvent(_message.Message):
    __slots__ = ("command_id", "counters", "hello", "loading", "ready", "failed", "response", "done", "heartbeat", "sampled")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    COMMAND_ID_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    HELLO_FIELD_NUMBER: _ClassVar[int]
    LOADING_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_FIELD_NUMBER: _ClassVar[int]
    command_id: int
    counters: _containers.ScalarMap[str, float]
    hello: WorkerHello
    loading: str
    ready: WorkerReady
    failed: _status_pb2.Status
    response: _trainer_service_pb2.TrainResponse
    done: WorkerDone
    heartbeat: WorkerHeartbeat
    sampled: _sampling_service_pb2.SampleResponse
    def __init__(self, command_id: _Optional[int] = ..., counters: _Optional[_Mapping[str, float]] = ..., hello: _Optional[_Union[WorkerHello, _Mapping]] = ..., loading: _Optional[str] = ..., ready: _Optional[_Union[WorkerReady, _Mapping]] = ..., failed: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., response: _Optional[_Union[_trainer_service_pb2.TrainResponse, _Mapping]] = ..., done: _Optional[_Union[WorkerDone, _Mapping]] = ..., heartbeat: _Optional[_Union[WorkerHeartbeat, _Mapping]] = ..., sampled: _Optional[_Union[_sampling_service_pb2.SampleResponse, _Mapping]] = ...) -> None: ...

class WorkerCreateRun(_message.Message):
    __slots__ = ("request", "snapshot_folder", "run_folder")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FOLDER_FIELD_NUMBER: _ClassVar[int]
    RUN_FOLDER_FIELD_NUMBER: _ClassVar[int]
    request: _trainer_service_pb2.CreateRunRequest
    snapshot_folder: str
    run_folder: str
    def __init__(self, request: _Optional[_Union[_trainer_service_pb2.CreateRunRequest, _Mapping]] = ..., snapshot_folder: _Optional[str] = ..., run_folder: _Optional[str] = ...) -> None: ...

class WorkerDeleteRun(_message.Message):
    __slots__ = ("unload",)
    UNLOAD_FIELD_NUMBER: _ClassVar[int]
    unload: bool
    def __init__(self, unload: bool = ...) -> None: ...

class WorkerDropGraphs(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerFailOperation(_message.Message):
    __slots__ = ("seq_id", "kind", "reason", "forward_seq_id")
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    FORWARD_SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    seq_id: int
    kind: str
    reason: str
    forward_seq_id: int
    def __init__(self, seq_id: _Optional[int] = ..., kind: _Optional[str] = ..., reason: _Optional[str] = ..., forward_seq_id: _Optional[int] = ...) -> None: ...

class WorkerSnapshotRun(_message.Message):
    __slots__ = ("folder",)
    FOLDER_FIELD_NUMBER: _ClassVar[int]
    folder: str
    def __init__(self, folder: _Optional[str] = ...) -> None: ...

class WorkerFreezeWeights(_message.Message):
    __slots__ = ("run_id", "seq_id")
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    SEQ_ID_FIELD_NUMBER: _ClassVar[int]
    run_id: str
    seq_id: int
    def __init__(self, run_id: _Optional[str] = ..., seq_id: _Optional[int] = ...) -> None: ...

class WorkerSample(_message.Message):
    __slots__ = ("sample_id", "request", "owner")
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    sample_id: str
    request: _sampling_service_pb2.SampleRequest
    owner: str
    def __init__(self, sample_id: _Optional[str] = ..., request: _Optional[_Union[_sampling_service_pb2.SampleRequest, _Mapping]] = ..., owner: _Optional[str] = ...) -> None: ...

class WorkerCancelSample(_message.Message):
    __slots__ = ("sample_id",)
    SAMPLE_ID_FIELD_NUMBER: _ClassVar[int]
    sample_id: str
    def __init__(self, sample_id: _Optional[str] = ...) -> None: ...

class WorkerOpenSampler(_message.Message):
    __slots__ = ("sampler", "lease_ms")
    SAMPLER_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    sampler: _sampling_service_pb2.Sampler
    lease_ms: int
    def __init__(self, sampler: _Optional[_Union[_sampling_service_pb2.Sampler, _Mapping]] = ..., lease_ms: _Optional[int] = ...) -> None: ...

class WorkerCloseSampler(_message.Message):
    __slots__ = ("sampler",)
    SAMPLER_FIELD_NUMBER: _ClassVar[int]
    sampler: _sampling_service_pb2.Sampler
    def __init__(self, sampler: _Optional[_Union[_sampling_service_pb2.Sampler, _Mapping]] = ...) -> None: ...

class WorkerCommand(_message.Message):
    __slots__ = ("command_id", "run_id", "create_run", "delete_run", "request", "drop_graphs", "fail_operation", "snapshot_run", "freeze_weights", "sample", "cancel_sample", "open_sampler", "close_sampler", "refused")
    COMMAND_ID_FIELD_NUMBER: _ClassVar[int]
    RUN_ID_FIELD_NUMBER: _ClassVar[int]
    CREATE_RUN_FIELD_NUMBER: _ClassVar[int]
    DELETE_RUN_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    DROP_GRAPHS_FIELD_NUMBER: _ClassVar[int]
    FAIL_OPERATION_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_RUN_FIELD_NUMBER: _ClassVar[int]
    FREEZE_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_FIELD_NUMBER: _ClassVar[int]
    CANCEL_SAMPLE_FIELD_NUMBER: _ClassVar[int]
    OPEN_SAMPLER_FIELD_NUMBER: _ClassVar[int]
    CLOSE_SAMPLER_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    command_id: int
    run_id: str
    create_run: WorkerCreateRun
    delete_run: WorkerDeleteRun
    request: _trainer_service_pb2.TrainRequest
    drop_graphs: WorkerDropGraphs
    fail_operation: WorkerFailOperation
    snapshot_run: WorkerSnapshotRun
    freeze_weights: WorkerFreezeWeights
    sample: WorkerSample
    cancel_sample: WorkerCancelSample
    open_sampler: WorkerOpenSampler
    close_sampler: WorkerCloseSampler
    refused: _status_pb2.Status
    def __init__(self, command_id: _Optional[int] = ..., run_id: _Optional[str] = ..., create_run: _Optional[_Union[WorkerCreateRun, _Mapping]] = ..., delete_run: _Optional[_Union[WorkerDeleteRun, _Mapping]] = ..., request: _Optional[_Union[_trainer_service_pb2.TrainRequest, _Mapping]] = ..., drop_graphs: _Optional[_Union[WorkerDropGraphs, _Mapping]] = ..., fail_operation: _Optional[_Union[WorkerFailOperation, _Mapping]] = ..., snapshot_run: _Optional[_Union[WorkerSnapshotRun, _Mapping]] = ..., freeze_weights: _Optional[_Union[WorkerFreezeWeights, _Mapping]] = ..., sample: _Optional[_Union[WorkerSample, _Mapping]] = ..., cancel_sample: _Optional[_Union[WorkerCancelSample, _Mapping]] = ..., open_sampler: _Optional[_Union[WorkerOpenSampler, _Mapping]] = ..., close_sampler: _Optional[_Union[WorkerCloseSampler, _Mapping]] = ..., refused: _Optional[_Union[_status_pb2.Status, _Mapping]] = ...) -> None: ...
