"""Frames that no client of ours would send: random messages of the protocol, encoded and then damaged."""

import random
from collections import Counter
from collections.abc import Iterable
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from gradwire.v1 import checkpoint_service_pb2, sampling_service_pb2, trainer_job_service_pb2, trainer_service_pb2

TRAINER = (trainer_service_pb2, checkpoint_service_pb2, sampling_service_pb2)
"""What a trainer serves."""
JOBS = (trainer_job_service_pb2,)
"""What the control plane serves."""
TIMEOUT_S = 60.0
"""From which on a call counts as hanging."""
_SAMPLE_S = 1.0
"""How long a sampler may answer; what it was asked may be endless."""
_TRAIN = "/gradwire.v1.TrainerService/Train"
_STRINGS = (
    "",
    "a",
    "cross_entropy",
    "logprobs",
    "weights",
    "target_tokens",
    "../../etc/passwd",
    "/a",
    "a\0b",
    "x" * 5000,
)


def methods(files: Iterable[Any]) -> dict[str, Any]:
    """Descriptors of every method of the files' services, by path."""
    return {
        f"/{service.full_name}/{method.name}": method
        for file in files
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }


class Frames:
    """A seeded source of frames.

    Args:
        seed: Makes them the same every time.
        run_id: Of a run that is there, so that some get far.
    """

    def __init__(self, seed: int, run_id: str) -> None:
        self.rng = random.Random(seed)
        self._run_id = run_id

    def message(self, descriptor: Any, depth: int = 0) -> Message:
        """A random message of a type."""
        made = message_factory.GetMessageClass(descriptor)()
        for field in descriptor.fields:
            if self.rng.random() < 0.4 or depth > 4:
                continue
            if field.name == "run_id" and self.rng.random() < 0.8:
                made.run_id = self._run_id  # pyright: ignore[reportAttributeAccessIssue]
                continue
            value = getattr(made, field.name)
            if field.message_type is not None and field.message_type.GetOptions().map_entry:
                self._fill_map(value, field.message_type.fields_by_name["value"], depth)
            elif hasattr(value, "add") or hasattr(value, "append"):
                for _ in range(self.rng.randrange(4)):
                    if field.message_type is not None:
                        value.add().CopyFrom(self.message(field.message_type, depth + 1))
                    else:
                        value.append(self._scalar(field))
            elif field.message_type is not None:
                value.CopyFrom(self.message(field.message_type, depth + 1))
            else:
                setattr(made, field.name, self._scalar(field))
        return made

    def damaged(self, encoded: bytes) -> bytes:
        """Bytes turned, taken out, put in, cut off; half the time as they were."""
        data = bytearray(encoded)
        while data and self.rng.random() < 0.5:
            at = self.rng.randrange(len(data))
            match self.rng.randrange(5):
                case 0:
                    data[at] ^= 1 << self.rng.randrange(8)
                case 1:
                    del data[at : at + self.rng.randrange(1, 9)]
                case 2:
                    data[at:at] = self.rng.randbytes(self.rng.randrange(1, 9))
                case 3:
                    del data[at:]
                case _:
                    data[at:at] = data[at : at + 64]
        return bytes(data)

    def frame(self, descriptor: Any) -> bytes:
        """A frame for a method that takes such messages."""
        if self.rng.random() < 0.05:
            return self.rng.randbytes(self.rng.randrange(200))
        return self.damaged(self.message(descriptor).SerializeToString())

    def attach(self) -> bytes:
        """A first frame of a stream, mostly a good one."""
        good = trainer_service_pb2.TrainRequest(attach={"run_id": self._run_id, "client_id": "fuzz"})
        encoded = good.SerializeToString()
        return encoded if self.rng.random() < 0.8 else self.damaged(encoded)

    def _fill_map(self, value: Any, of: FieldDescriptor, depth: int) -> None:
        for _ in range(self.rng.randrange(3)):
            key = self.rng.choice(_STRINGS)
            if of.message_type is not None:
                value[key].CopyFrom(self.message(of.message_type, depth + 1))
            else:
                value[key] = self._scalar(of)

    def _scalar(self, field: FieldDescriptor) -> Any:
        rng = self.rng
        match field.cpp_type:
            case FieldDescriptor.CPPTYPE_STRING if field.type == FieldDescriptor.TYPE_BYTES:
                return rng.randbytes(rng.choice((0, 1, 4, 12, 64)))
            case FieldDescriptor.CPPTYPE_STRING:
                path = f"gradwire://{self._run_id}/{rng.choice(('state', 'sampler_weights'))}/{rng.choice(_STRINGS)}"
                return rng.choice((*_STRINGS, self._run_id, path))
            case FieldDescriptor.CPPTYPE_BOOL:
                return rng.random() < 0.5
            case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
                return rng.choice((0.0, 1.0, -1.0, 1e-4, 1e30, float("nan"), float("inf")))
            case FieldDescriptor.CPPTYPE_ENUM:
                return rng.choice((0, 1, 2, 3, 77))
            case FieldDescriptor.CPPTYPE_INT32:
                return rng.choice((0, 1, -1, 5, 2**31 - 1, -(2**31)))
            case FieldDescriptor.CPPTYPE_INT64:
                return rng.choice((0, 1, -1, 3, 2**63 - 1, -(2**63)))
            case FieldDescriptor.CPPTYPE_UINT32:
                return rng.choice((0, 1, 2, 7, 2**32 - 1))
            case _:
                return rng.choice((0, 1, 2, 3, 7, 2**64 - 1))


def send_frames(
    address: str, frames: Frames, count: int, *, files: Iterable[Any] = TRAINER, api_key: str = ""
) -> Counter[str]:
    """Sends frames over every method and the stream; how often each status came.

    Args:
        address: host:port of a server.
        frames: What is sent.
        count: How many, at least.
        files: Whose services it serves.
        api_key: That opens it.

    Raises:
        AssertionError: A call hung, or was answered INTERNAL or UNKNOWN.
    """
    seen: Counter[str] = Counter()
    known = methods(files)
    streams = [_TRAIN] * 6 if _TRAIN in known else []
    metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
    # Not grpc.aio, whose calls report a write that comes too late as INTERNAL in place of the status that came.
    with grpc.insecure_channel(address) as channel:
        while sum(seen.values()) < count:
            path = frames.rng.choice([*known, *streams])
            if path == _TRAIN:
                sent = [
                    frames.attach(),
                    *(frames.frame(known[path].input_type) for _ in range(frames.rng.randrange(6))),
                ]
                code = _stream(channel, sent, metadata)
            else:
                sent = [frames.frame(known[path].input_type)]
                code = _call(channel, path, known[path].server_streaming, sent[0], metadata)
            said = f"{path} answered {code} to {[frame.hex() for frame in sent]}"
            assert not code.startswith(("INTERNAL", "UNKNOWN")), said
            assert code != "DEADLINE_EXCEEDED" or path.endswith("/Sample"), said
            seen[code] += len(sent)
    return seen


def _call(channel: grpc.Channel, path: str, streams: bool, frame: bytes, metadata: Any) -> str:
    timeout_s = _SAMPLE_S if path.endswith("/Sample") else TIMEOUT_S
    try:
        if not streams:
            channel.unary_unary(path)(frame, timeout=timeout_s, metadata=metadata)
            return "OK"
        for _ in channel.unary_stream(path)(frame, timeout=timeout_s, metadata=metadata):
            pass
    except grpc.RpcError as exc:
        return _code(exc)
    return "OK"


def _stream(channel: grpc.Channel, sent: list[bytes], metadata: Any) -> str:
    try:
        for _ in channel.stream_stream(_TRAIN)(iter(sent), timeout=TIMEOUT_S, metadata=metadata):
            pass
    except grpc.RpcError as exc:
        return _code(exc)
    return "OK"


def _code(exc: Any) -> str:
    """The status of a call; a fault inside is told with its words."""
    name = exc.code().name
    return f"{name} ({exc.details()})" if name in ("INTERNAL", "UNKNOWN") else name
