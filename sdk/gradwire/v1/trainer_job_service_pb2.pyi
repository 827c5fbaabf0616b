import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TrainerJobState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRAINER_JOB_STATE_UNSPECIFIED: _ClassVar[TrainerJobState]
    TRAINER_JOB_STATE_STARTING: _ClassVar[TrainerJobState]
    TRAINER_JOB_STATE_READY: _ClassVar[TrainerJobState]
    TRAINER_JOB_STATE_FAILED: _ClassVar[TrainerJobState]
TRAINER_JOB_STATE_UNSPECIFIED: TrainerJobState
TRAINER_JOB_STATE_STARTING: TrainerJobState
TRAINER_JOB_STATE_READY: TrainerJobState
TRAINER_JOB_STATE_FAILED: TrainerJobState

class TrainerJob(_message.Message):
    __slots__ = ("job_id", "job_name", "base_url", "base_model", "state", "status_message", "log_tail", "created_at", "log_path", "ca_certificate")
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    JOB_NAME_FIELD_NUMBER: _ClassVar[int]
    BASE_URL_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STATUS_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    LOG_TAIL_FIELD_NUMBER: _ClassVar[int]
    CREATED_AT_FIELD_NUMBER: _ClassVar[int]
    LOG_PATH_FIELD_NUMBER: _ClassVar[int]
    CA_CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    job_name: str
    base_url: str
    base_model: str
    state: TrainerJobState
    status_message: str
    log_tail: str
    created_at: _timestamp_pb2.Timestamp
    log_path: str
    ca_certificate: str
    def __init__(self, job_id: _Optional[str] = ..., job_name: _Optional[str] = ..., base_url: _Optional[str] = ..., base_model: _Optional[str] = ..., state: _Optional[_Union[TrainerJobState, str]] = ..., status_message: _Optional[str] = ..., log_tail: _Optional[str] = ..., created_at: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., log_path: _Optional[str] = ..., ca_certificate: _Optional[str] = ...) -> None: ...

class CreateTrainerJobRequest(_message.Message):
    __slots__ = ("request_id", "base_model", "display_name", "lora_rank", "max_context_length", "accelerator_type", "accelerator_count", "node_count")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    DISPLAY_NAME_FIELD_NUMBER: _ClassVar[int]
    LORA_RANK_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    ACCELERATOR_TYPE_FIELD_NUMBER: _ClassVar[int]
    ACCELERATOR_COUNT_FIELD_NUMBER: _ClassVar[int]
    NODE_COUNT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    base_model: str
    display_name: str
    lora_rank: int
    max_context_length: int
    accelerator_type: str
    accelerator_count: int
    node_count: int
    def __init__(self, request_id: _Optional[str] = ..., base_model: _Optional[str] = ..., display_name: _Optional[str] = ..., lora_rank: _Optional[int] = ..., max_context_length: _Optional[int] = ..., accelerator_type: _Optional[str] = ..., accelerator_count: _Optional[int] = ..., node_count: _Optional[int] = ...) -> None: ...

class CreateTrainerJobResponse(_message.Message):
    __slots__ = ("trainer_job",)
    TRAINER_JOB_FIELD_NUMBER: _ClassVar[int]
    trainer_job: TrainerJob
    def __init__(self, trainer_job: _Optional[_Union[TrainerJob, _Mapping]] = ...) -> None: ...

class GetTrainerJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class GetTrainerJobResponse(_message.Message):
    __slots__ = ("trainer_job",)
    TRAINER_JOB_FIELD_NUMBER: _ClassVar[int]
    trainer_job: TrainerJob
    def __init__(self, trainer_job: _Optional[_Union[TrainerJob, _Mapping]] = ...) -> None: ...

class ListTrainerJobsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListTrainerJobsResponse(_message.Message):
    __slots__ = ("trainer_jobs",)
    TRAINER_JOBS_FIELD_NUMBER: _ClassVar[int]
    trainer_jobs: _containers.RepeatedCompositeFieldContainer[TrainerJob]
    def __init__(self, trainer_jobs: _Optional[_Iterable[_Union[TrainerJob, _Mapping]]] = ...) -> None: ...

class DeleteTrainerJobRequest(_message.Message):
    __slots__ = ("job_id",)
    JOB_ID_FIELD_NUMBER: _ClassVar[int]
    job_id: str
    def __init__(self, job_id: _Optional[str] = ...) -> None: ...

class DeleteTrainerJobResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
