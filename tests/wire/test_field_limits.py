"""Every string and every list of every request is bounded, and refused before the worker hears of it."""

import asyncio
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from gradwire.errors import GradwireError, from_status
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1 import sampling_service_pb2
from gradwire.v1 import trainer_service_pb2 as pb
from gradwire.v1.datum_pb2 import ModelInput

from tests.frames import TRAINER, methods
from tests.front_end import FrontEnd, front_end
from tests.long_fields import Unit, long_fields, map_entry
from tests.owners import error_of
from trainer_service.config import Limits
from trainer_service.field_limits import LIMIT_OF, check_num_fields
from trainer_service.rpc.trainer_servicer import TrainerServicer

SMALL = Limits(
    max_name_bytes=48,
    max_tokens=60,
    max_loss_fn_inputs=3,
    max_loss_fn_config_keys=4,
    max_forward_seq_ids=5,
    max_typed_datums=6,
    max_typed_values=7,
    max_tensor_dims=8,
    max_prompt_text_bytes=50,
    max_stop_token_ids=10,
    max_stop_strings=11,
    max_stop_string_bytes=12,
    max_stop_bytes=100,
    max_metrics=9,
)
STREAM = "/gradwire.v1.TrainerService/Train"
METHODS = methods(TRAINER)


def limit_of(field: FieldDescriptor) -> str:
    return LIMIT_OF[field.full_name.removeprefix("gradwire.v1.")]


def one_too_many(field: FieldDescriptor, unit: Unit) -> int:
    # A message as large as that is refused for its own size.
    if limit_of(field) == "max_message_bytes":
        return 1
    one_of_several = field.is_repeated and unit == "bytes"
    return getattr(SMALL, limit_of_one(field) if one_of_several else limit_of(field)) + 1


def limit_of_one(field: FieldDescriptor) -> str:
    """Of one string of several."""
    return "max_stop_string_bytes" if field.full_name == "gradwire.v1.Stop.strings" else "max_name_bytes"


def overfull() -> Iterator[Any]:
    """(method, path of the field, limit, message) for every field of every unary request."""
    for path, method in METHODS.items():
        for where, field, message in long_fields(method.input_type, one_too_many) if path != STREAM else ():
            if limit_of(field) != "max_message_bytes":
                limit = limit_of_one(field) if where.endswith(" one") else limit_of(field)
                yield pytest.param(path, where, limit, message, id=f"{method.name}.{where.replace(' ', '_')}")


def requests_fields(descriptor: Descriptor, seen: set[str]) -> Iterator[FieldDescriptor]:
    """All fields of a message and of those in it."""
    if descriptor.full_name not in seen:
        seen.add(descriptor.full_name)
        for field in descriptor.fields:
            yield field
            if field.message_type is not None:
                yield from requests_fields(field.message_type, seen)


def test_every_string_and_list_of_every_request_has_a_limit_that_is_announced():
    seen: set[str] = set()
    bounded = {
        field.full_name.removeprefix("gradwire.v1.")
        for method in METHODS.values()
        for field in requests_fields(method.input_type, seen)
        if field.is_repeated or map_entry(field) or field.cpp_type == FieldDescriptor.CPPTYPE_STRING
    }
    assert bounded == set(LIMIT_OF)
    assert set(LIMIT_OF.values()) <= {field.name for field in pb.Limits.DESCRIPTOR.fields}


async def call(trainer: FrontEnd, path: str, message: Message) -> Any:
    """Calls a method by its path."""
    method = METHODS[path]
    if method.server_streaming:
        stream = trainer.channel.unary_stream(path, request_serializer=type(message).SerializeToString)(message)
        return [response async for response in stream]
    return await trainer.channel.unary_unary(path, request_serializer=type(message).SerializeToString)(message)


async def test_one_more_than_is_taken_is_refused_by_field_limit_and_number_and_no_worker_hears_of_it():
    async with front_end(limits=SMALL) as trainer:
        run_id = await trainer.create_run()
        heard = len(trainer.worker.executed)
        for case in overfull():
            path, where, limit_name, message = case.values
            if "run_id" in message.DESCRIPTOR.fields_by_name and where != "run_id":
                message.run_id = run_id
            refused = await error_of(call(trainer, path, message))
            told = (case.id, refused.message)
            assert refused.reason == "LIMIT_EXCEEDED", told
            assert refused.metadata["limit_name"] == limit_name, told
            assert refused.metadata["limit"] == str(getattr(SMALL, limit_name)), told
            assert int(refused.metadata["got"]) > getattr(SMALL, limit_name), told
            assert limit_name in refused.message, told
            named = where.split(" ")[0].split("[")[0]
            assert named in refused.message, told
        told = {kind for _, _, kind in trainer.worker.executed[heard:]}
        assert told == {"fail_operation"}


async def test_as_many_as_are_taken_are_taken():
    async with front_end(limits=SMALL) as trainer:
        run_id = await trainer.create_run(display_name="d" * 48)
        stop = sampling_service_pb2.Stop(strings=["sss"] * 11, token_ids=[1] * 10)
        params = sampling_service_pb2.SamplingParams(stop=stop, max_tokens=1)
        request = sampling_service_pb2.SampleRequest(prompt=ModelInput(tokens=[1] * 60), sampling_params=params)
        assert [response async for response in trainer.sampling.Sample(request)]
        await trainer.stub.Cancel(ops.CancelRequest(run_id=run_id, forward_seq_ids=[1] * 5))


async def test_stop_strings_together_have_a_limit():
    async with front_end(limits=SMALL) as trainer:
        stop = sampling_service_pb2.Stop(strings=["é" * 6] * 9)
        params = sampling_service_pb2.SamplingParams(stop=stop)
        request = sampling_service_pb2.SampleRequest(prompt=ModelInput(tokens=[1]), sampling_params=params)
        refused = await error_of(trainer.sampling.Sample(request).read())
        assert refused.field_violations == (
            (
                "sampling_params.stop.strings",
                "has 108 bytes in all, but at most 100 are taken (max_stop_bytes of GetServerInfo).",
            ),
        )


async def test_on_the_stream_a_refused_operation_takes_its_number_and_leaves_its_mark_and_nothing_else(tmp_path: Path):
    async with front_end(limits=SMALL, data_dir=tmp_path) as trainer:
        run_id = await trainer.create_run()
        stream = await trainer.attach(run_id)
        too_many = ops.ForwardBackwardRequest(loss_fn="l", loss_fn_config={f"k{number}": 1 for number in range(5)})
        await stream.send(1, forward_backward=too_many)
        await stream.send(2, optim_step={})
        first, second = await stream.receive(), await stream.receive()
        assert from_status(first.error).metadata["limit_name"] == "max_loss_fn_config_keys"
        assert second.WhichOneof("result") == "optim_step"
        assert trainer.worker.executed[-2:] == [(run_id, 1, "fail_operation"), (run_id, 2, "optim_step")]
        with closing(sqlite3.connect(tmp_path / "runs" / run_id / "journal.sqlite")) as db:
            assert max(len(row[0]) for row in db.execute("SELECT request FROM operations")) < 20
        # Sent again, it gets the same answer.
        await stream.send(1, forward_backward=too_many)
        assert (await stream.receive()).error == first.error


async def test_a_client_id_that_is_too_long_ends_the_stream():
    async with front_end(limits=SMALL) as trainer:
        run_id = await trainer.create_run()
        call = trainer.stub.Train()
        await call.write(pb.TrainRequest(attach=pb.AttachRequest(run_id=run_id, client_id="c" * 49)))
        refused = await error_of(call.read())
        assert (refused.reason, refused.field_violations[0][0]) == ("LIMIT_EXCEEDED", "client_id")


async def test_a_prompt_that_the_context_does_not_hold_never_reaches_the_worker():
    async with front_end() as trainer:
        for call in ("Sample", "ComputeLogprobs"):
            request_type = getattr(sampling_service_pb2, f"{call}Request")
            answer = getattr(trainer.sampling, call)(request_type(prompt=ModelInput(tokens=[1] * 65)))
            refused = await error_of(answer.read() if call == "Sample" else answer)
            assert (refused.reason, refused.metadata["limit"], refused.metadata["got"]) == (
                "SEQUENCE_TOO_LONG",
                "64",
                "65",
            )
        assert trainer.worker.executed == []


async def test_a_request_that_was_given_up_keeps_its_place_until_the_worker_is_done_with_it():
    async with front_end(limits=replace(SMALL, max_sample_requests=1)) as trainer:
        call = trainer.sampling.Sample(sampling_service_pb2.SampleRequest(prompt=ModelInput(tokens=[1])))
        assert (await call.read()).samples
        trainer.worker.gate.clear()
        call.cancel()
        await trainer.worker.has_waiting(1)
        other = trainer.sampling.Sample(sampling_service_pb2.SampleRequest(prompt=ModelInput(tokens=[1])))
        assert (await error_of(other.read())).reason == "LIMIT_EXCEEDED"
        trainer.worker.gate.set()
        while len(trainer.server.sampling):  # noqa: ASYNC110  (there is no event for it)
            await asyncio.sleep(0.01)


async def test_a_message_of_more_fields_than_are_taken_is_refused_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch):
    parsed = []
    monkeypatch.setattr(TrainerServicer, "ForwardBackward", lambda *_: parsed.append("handled"))
    async with front_end(limits=Limits(max_message_fields=100)) as trainer:
        method = "/gradwire.v1.TrainerService/ForwardBackward"
        entries = ops.ForwardBackwardRequest(loss_fn_config={f"k{number}": 1 for number in range(40)})
        datums = ops.ForwardBackwardRequest(data=[{"model_input": {"tokens": [1]}}] * 60)
        group = b"\x9b\x06"
        for encoded in (
            entries.SerializeToString(),
            datums.SerializeToString(),
            b"\x18\x01" * 101,
            ops.CancelRequest(forward_seq_ids=[1] * 10).SerializeToString() + group + b"\x0b" * 200,
            b"\xff" * 200,
        ):
            refused = await error_of(trainer.channel.unary_unary(method)(encoded))
            assert refused.reason in ("LIMIT_EXCEEDED", "PROTOCOL_VIOLATION")
            if refused.reason == "LIMIT_EXCEEDED":
                assert refused.metadata["limit_name"] == "max_message_fields"
        assert parsed == []
        run_id = await trainer.create_run()
        stream = await trainer.attach(run_id)
        await stream.send(1, forward_backward=entries)
        assert (await stream.ended()).metadata["limit_name"] == "max_message_fields"
        # As one message too large, it takes no number.
        stream = await trainer.attach(run_id)
        assert stream.attached.next_seq_id == 1


def test_as_many_fields_as_are_taken_are_counted_nested_ones_included():
    message = ops.ForwardBackwardRequest(data=[{"model_input": {"tokens": [1, 2, 3]}}] * 3, loss_fn="l" * 20)
    descriptor, encoded = ops.DESCRIPTOR.message_types_by_name["ForwardBackwardRequest"], message.SerializeToString()
    # Three datums, their inputs, the packed tokens in those, and the loss.
    check_num_fields(encoded, descriptor, Limits(max_message_fields=10))
    with pytest.raises(GradwireError, match="more than 9 fields"):
        check_num_fields(encoded, descriptor, Limits(max_message_fields=9))
