from google.rpc import status_pb2 as _status_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AccessRequest(_message.Message):
    __slots__ = ("start_id", "set", "add", "compare_set", "wait", "check", "delete")
    START_ID_FIELD_NUMBER: _ClassVar[int]
    SET_FIELD_NUMBER: _ClassVar[int]
    ADD_FIELD_NUMBER: _ClassVar[int]
    COMPARE_SET_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    CHECK_FIELD_NUMBER: _ClassVar[int]
    DELETE_FIELD_NUMBER: _ClassVar[int]
    start_id: str
    set: StoreEntry
    add: StoreSum
    compare_set: StoreExchange
    wait: StoreWait
    check: StoreKeys
    delete: str
    def __init__(self, start_id: _Optional[str] = ..., set: _Optional[_Union[StoreEntry, _Mapping]] = ..., add: _Optional[_Union[StoreSum, _Mapping]] = ..., compare_set: _Optional[_Union[StoreExchange, _Mapping]] = ..., wait: _Optional[_Union[StoreWait, _Mapping]] = ..., check: _Optional[_Union[StoreKeys, _Mapping]] = ..., delete: _Optional[str] = ...) -> None: ...

class StoreEntry(_message.Message):
    __slots__ = ("key", "value")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    key: str
    value: bytes
    def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...

class StoreSum(_message.Message):
    __slots__ = ("key", "amount")
    KEY_FIELD_NUMBER: _ClassVar[int]
    AMOUNT_FIELD_NUMBER: _ClassVar[int]
    key: str
    amount: int
    def __init__(self, key: _Optional[str] = ..., amount: _Optional[int] = ...) -> None: ...

class StoreExchange(_message.Message):
    __slots__ = ("key", "expected", "desired")
    KEY_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_FIELD_NUMBER: _ClassVar[int]
    DESIRED_FIELD_NUMBER: _ClassVar[int]
    key: str
    expected: bytes
    desired: bytes
    def __init__(self, key: _Optional[str] = ..., expected: _Optional[bytes] = ..., desired: _Optional[bytes] = ...) -> None: ...

class StoreKeys(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, keys: _Optional[_Iterable[str]] = ...) -> None: ...

class StoreWait(_message.Message):
    __slots__ = ("keys", "timeout_ms")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_MS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[str]
    timeout_ms: int
    def __init__(self, keys: _Optional[_Iterable[str]] = ..., timeout_ms: _Optional[int] = ...) -> None: ...

class AccessResponse(_message.Message):
    __slots__ = ("values", "sum", "found")
    VALUES_FIELD_NUMBER: _ClassVar[int]
    SUM_FIELD_NUMBER: _ClassVar[int]
    FOUND_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[bytes]
    sum: int
    found: bool
    def __init__(self, values: _Optional[_Iterable[bytes]] = ..., sum: _Optional[int] = ..., found: bool = ...) -> None: ...

class NodeHello(_message.Message):
    __slots__ = ("node_rank", "software_version", "instance_id")
    NODE_RANK_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_VERSION_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    node_rank: int
    software_version: str
    instance_id: str
    def __init__(self, node_rank: _Optional[int] = ..., software_version: _Optional[str] = ..., instance_id: _Optional[str] = ...) -> None: ...

class NodeWelcome(_message.Message):
    __slots__ = ("base_model", "shared_files")
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    SHARED_FILES_FIELD_NUMBER: _ClassVar[int]
    base_model: str
    shared_files: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, base_model: _Optional[str] = ..., shared_files: _Optional[_Iterable[str]] = ...) -> None: ...

class NodeFacts(_message.Message):
    __slots__ = ("model_digest", "base_model", "model_error", "shared_contents", "num_gpus")
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BASE_MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_ERROR_FIELD_NUMBER: _ClassVar[int]
    SHARED_CONTENTS_FIELD_NUMBER: _ClassVar[int]
    NUM_GPUS_FIELD_NUMBER: _ClassVar[int]
    model_digest: str
    base_model: str
    model_error: str
    shared_contents: _containers.RepeatedScalarFieldContainer[str]
    num_gpus: int
    def __init__(self, model_digest: _Optional[str] = ..., base_model: _Optional[str] = ..., model_error: _Optional[str] = ..., shared_contents: _Optional[_Iterable[str]] = ..., num_gpus: _Optional[int] = ...) -> None: ...

class NodeAccepted(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NodeStart(_message.Message):
    __slots__ = ("start_id", "local_world_size", "nnodes", "options", "spare")
    START_ID_FIELD_NUMBER: _ClassVar[int]
    LOCAL_WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    NNODES_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    SPARE_FIELD_NUMBER: _ClassVar[int]
    start_id: str
    local_world_size: int
    nnodes: int
    options: _containers.RepeatedScalarFieldContainer[str]
    spare: bool
    def __init__(self, start_id: _Optional[str] = ..., local_world_size: _Optional[int] = ..., nnodes: _Optional[int] = ..., options: _Optional[_Iterable[str]] = ..., spare: bool = ...) -> None: ...

class NodeStop(_message.Message):
    __slots__ = ("start_id", "grace_ms")
    START_ID_FIELD_NUMBER: _ClassVar[int]
    GRACE_MS_FIELD_NUMBER: _ClassVar[int]
    start_id: str
    grace_ms: int
    def __init__(self, start_id: _Optional[str] = ..., grace_ms: _Optional[int] = ...) -> None: ...

class NodeEnded(_message.Message):
    __slots__ = ("start_id", "reason", "because", "killed")
    START_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    BECAUSE_FIELD_NUMBER: _ClassVar[int]
    KILLED_FIELD_NUMBER: _ClassVar[int]
    start_id: str
    reason: str
    because: _status_pb2.Status
    killed: bool
    def __init__(self, start_id: _Optional[str] = ..., reason: _Optional[str] = ..., because: _Optional[_Union[_status_pb2.Status, _Mapping]] = ..., killed: bool = ...) -> None: ...

class NodeAlive(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NodeEvent(_message.Message):
    __slots__ = ("hello", "facts", "ended", "alive")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    FACTS_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    hello: NodeHello
    facts: NodeFacts
    ended: NodeEnded
    alive: NodeAlive
    def __init__(self, hello: _Optional[_Union[NodeHello, _Mapping]] = ..., facts: _Optional[_Union[NodeFacts, _Mapping]] = ..., ended: _Optional[_Union[NodeEnded, _Mapping]] = ..., alive: _Optional[_Union[NodeAlive, _Mapping]] = ...) -> None: ...

class NodeCommand(_message.Message):
    __slots__ = ("welcome", "accepted", "start", "begin", "stop")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    BEGIN_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    welcome: NodeWelcome
    accepted: NodeAccepted
    start: NodeStart
    begin: str
    stop: NodeStop
    def __init__(self, welcome: _Optional[_Union[NodeWelcome, _Mapping]] = ..., accepted: _Optional[_Union[NodeAccepted, _Mapping]] = ..., start: _Optional[_Union[NodeStart, _Mapping]] = ..., begin: _Optional[str] = ..., stop: _Optional[_Union[NodeStop, _Mapping]] = ...) -> None: ...
