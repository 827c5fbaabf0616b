"""Errors on both sides of the wire."""

import pickle

import pytest
from gradwire import errors
from gradwire.v1.error_pb2 import ErrorReason


def test_every_reason_of_the_proto_has_its_code():
    names = {name.removeprefix("ERROR_REASON_") for name in ErrorReason.DESCRIPTOR.values_by_name} - {"UNSPECIFIED"}
    assert names == set(errors.ERROR_CODES)


@pytest.mark.parametrize("reason", sorted(errors.ERROR_CODES))
def test_an_error_comes_back_as_it_was_raised(reason: str):
    raised = errors.error(reason, "A sentence.", retry_after_s=1.5, failed_seq_id=7)
    back = errors.from_status(errors.to_status(raised))
    assert type(back) is type(raised)
    assert (back.reason, back.message, back.code) == (reason, "A sentence.", errors.ERROR_CODES[reason])
    assert back.metadata == {"failed_seq_id": "7"}
    assert back.retry_after_s == 1.5


def test_a_field_violation_comes_back():
    raised = errors.invalid_field("data[3].model_input", "has no tokens.")
    back = errors.from_status(errors.to_status(raised))
    assert back.field_violations == (("data[3].model_input", "has no tokens."),)
    assert str(back) == "data[3].model_input has no tokens."


@pytest.mark.parametrize(
    ("reason", "stdlib"),
    [
        ("INVALID_FIELD", ValueError),
        ("RUN_NOT_FOUND", LookupError),
        ("CHECKPOINT_EXISTS", FileExistsError),
        ("NO_GRADIENTS", RuntimeError),
        ("DEVICE_OUT_OF_MEMORY", MemoryError),
        ("INVALID_API_KEY", PermissionError),
        ("WORKER_DIED", ConnectionError),
        ("NOT_IMPLEMENTED", NotImplementedError),
    ],
)
def test_errors_are_stdlib_errors_too(reason: str, stdlib: type[Exception]):
    assert isinstance(errors.error(reason, "x"), stdlib)


def test_errors_survive_pickling():
    raised = errors.error("PRIOR_OPERATION_FAILED", "x", failed_seq_id=3)
    back = pickle.loads(pickle.dumps(raised))
    assert isinstance(back, errors.PriorOperationFailedError)
    assert back.failed_seq_id == 3
