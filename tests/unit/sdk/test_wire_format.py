"""Messages looked at without parsing them: an outline stands for its message, what is broken in it included."""

import pytest
from google.protobuf.message import DecodeError
from gradwire._wire.wire_format import embed, fields, outline
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.datum_pb2 import Datum, DatumBatch
from gradwire.v1.tensor_pb2 import DATA_TYPE_FLOAT32, IntValues, Tensor
from gradwire.v1.trainer_service_pb2 import TrainRequest
from hypothesis import given, settings
from hypothesis import strategies as st

LARGE = bytes(5000)


def request(data: bytes, *, loss_fn: str = "cross_entropy") -> TrainRequest:
    tensor = Tensor(data=data, dtype=DATA_TYPE_FLOAT32, shape=[len(data) // 4])
    batch = DatumBatch(tokens=tensor, cu_seqlens=tensor, loss_fn_inputs={"weights": tensor, "target_tokens": tensor})
    typed = Datum(loss_fn_inputs={"weights": Tensor(ints=IntValues(values=range(3000)))})
    operation = ops.ForwardBackwardRequest(batch=batch, data=[typed], loss_fn=loss_fn, loss_fn_config={"clip": 0.2})
    return TrainRequest(seq_id=7, acked_seq_id=3, forward_backward=operation)


def parses(encoded: bytes) -> bool:
    try:
        TrainRequest.FromString(encoded)
    except DecodeError:
        return False
    return True


def outlined(encoded: bytes) -> TrainRequest:
    return TrainRequest.FromString(outline(memoryview(encoded), TrainRequest.DESCRIPTOR))


def test_an_outline_is_the_message_but_for_what_large_tensors_hold():
    made = outlined(request(LARGE).SerializeToString())
    assert made.forward_backward.batch.tokens.WhichOneof("elements") == "data"
    tensors = [made.forward_backward.batch.tokens, made.forward_backward.batch.cu_seqlens]
    for tensor in [*tensors, *made.forward_backward.batch.loss_fn_inputs.values()]:
        assert not tensor.data
        tensor.data = LARGE
    assert made == request(LARGE)


def test_small_tensors_and_large_texts_stay():
    whole = request(bytes(400), loss_fn="x" * 10_000)
    assert outlined(whole.SerializeToString()) == whole


@settings(max_examples=300)
@given(st.data())
def test_an_outline_parses_exactly_if_the_message_does(data: st.DataObject):
    encoded = bytearray(request(LARGE).SerializeToString())
    headers = [place for place, byte in enumerate(encoded) if byte]
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(headers)) if data.draw(st.booleans()) else data.draw(st.integers(0, 120))
        encoded[place] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del encoded[data.draw(st.integers(0, len(encoded))) :]
    try:
        made = outline(memoryview(encoded), TrainRequest.DESCRIPTOR)
    except (ValueError, IndexError):
        return  # It makes no statement; the message itself is parsed.
    assert parses(made) == parses(bytes(encoded))


def test_a_length_of_more_bytes_than_it_needs_has_no_outline():
    length = bytes([len(LARGE) & 0x7F | 0x80, len(LARGE) >> 7 | 0x80, 0])
    with pytest.raises(ValueError, match="longer than it needs"):
        outline(memoryview(b"\x0a" + length + LARGE), Tensor.DESCRIPTOR)


@pytest.mark.parametrize("cut", [1, 100, len(LARGE)])
def test_a_content_that_is_cut_off_is_no_field(cut: int):
    with pytest.raises(ValueError, match="ends behind its message"):
        list(fields(memoryview(b"".join(embed(1, LARGE))[:-cut])))
