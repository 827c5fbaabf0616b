"""The control plane's part of fuzz.py: frames no client would send, and every string and repeated field at its longest.

The trainers are fakes. Each frame must be answered with a status other than INTERNAL or UNKNOWN; what is long must be
refused in a short sentence, and must leave neither a long log nor a job behind. Another key's job stays as it was.
"""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from gradwire import TrainerJobConfig, TrainerJobManager

from benchmarks.processes import num_handles, resident_mib
from tests.frames import JOBS, TIMEOUT_S, Frames, methods, send_frames
from tests.jobs_process import running_jobs

_KEYS = "alice alices-key,bob bobs-key"
_LENGTHS = (10_000, 100_000, 900_000, 4_000_000)
"""Bytes, or elements; the control plane takes messages of 1 MiB."""
_TEXTS = ("x", "\n", "\x1b[31m", "é", "../", "\0")
_MAX_SENTENCE_CHARS = 2_000
_MAX_LOG_BYTES = 2_000_000


def fuzz_jobs(folder: Path, frames: int, seed: int) -> None:
    """Prints a line of what was answered.

    Args:
        folder: For the control plane's data.
        frames: How many random ones.
        seed: Makes them the same every time.
    """
    start_s = time.monotonic()
    with running_jobs(folder, api_keys=_KEYS) as (process, base_url):
        address = base_url.removeprefix("http://")
        with TrainerJobManager("bobs-key", base_url=base_url, quiet=True) as bob:
            bobs = bob.create_and_wait(TrainerJobConfig("quick"))
            seen = send_frames(address, Frames(seed, bobs.job_id), frames, files=JOBS, api_key="alices-key")
            with TrainerJobManager("alices-key", base_url=base_url, quiet=True) as alice:
                for job in alice.list():
                    alice.delete(job.job_id)
                seen += send_long_fields(address, files=JOBS, api_key="alices-key")
                assert alice.list() == [], "a field that was refused made a job"
            assert bob.get(bobs.job_id) == bobs, "another key's job is not as it was"
            cells = f"{resident_mib(process.pid):.0f} MiB, {num_handles(process.pid)} handles"
    log_bytes = (folder / "jobs.log").stat().st_size
    assert log_bytes < _MAX_LOG_BYTES, f"the log has {log_bytes} bytes"
    took_s = time.monotonic() - start_s
    print(
        f"control plane: {sum(seen.values())} frames in {took_s:.0f} s, {cells}; statuses: {dict(seen.most_common())}"
    )


def send_long_fields(address: str, *, files: Any, api_key: str) -> Counter[str]:
    """Sends every method each of its strings and repeated fields at every length; how often each status came.

    Raises:
        AssertionError: One was taken, answered INTERNAL or UNKNOWN, not at all, or at length.
    """
    seen: Counter[str] = Counter()
    metadata = (("authorization", f"Bearer {api_key}"),)
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(address, options) as channel:
        for path, method in methods(files).items():
            for name, message in long_messages(method.input_type):
                try:
                    channel.unary_unary(path)(message.SerializeToString(), timeout=TIMEOUT_S, metadata=metadata)
                    raise AssertionError(f"{path} took a long {name}")
                except grpc.RpcError as exc:
                    failed: Any = exc
                code, details = failed.code().name, failed.details() or ""
                assert code in ("INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED"), (
                    f"{path} {name}: {code} {details}"
                )
                assert len(details) <= _MAX_SENTENCE_CHARS, f"{path} {name}: {len(details)} characters of error"
                seen[code] += 1
    return seen


def long_messages(descriptor: Any) -> Iterator[tuple[str, Message]]:
    """(field, message) of every string and repeated field of a message type at every length; other strings are "m"."""
    texts = [field for field in descriptor.fields if field.cpp_type == FieldDescriptor.CPPTYPE_STRING]
    for field in descriptor.fields:
        values = (
            [text * (length // len(text.encode())) for length in _LENGTHS for text in _TEXTS] if field in texts else []
        )
        if field.is_repeated:
            values = [[value] for value in values] + [[_empty(field)] * length for length in _LENGTHS[:3]]
        for value in values:
            made = message_factory.GetMessageClass(descriptor)()
            for text in texts:
                if not text.is_repeated:
                    setattr(made, text.name, "m")
            if field.is_repeated:
                getattr(made, field.name).extend(value)
            else:
                setattr(made, field.name, value)
            yield field.name, made


def _empty(field: FieldDescriptor) -> Any:
    return message_factory.GetMessageClass(field.message_type)() if field.message_type else field.default_value or ""
