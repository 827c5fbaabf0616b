"""gradwire:// paths: what they name, and that nothing else is taken for one (trainer_service/paths.py)."""

from pathlib import Path

import pytest
from gradwire.errors import InvalidArgumentError

from trainer_service.paths import CheckpointPath, SamplerPath, check_checkpoint_name

STATE, WEIGHTS, FROZEN_WEIGHTS = (
    f"gradwire://run-1/{place}" for place in ("state/step-1.5", "sampler_weights/_a", "frozen_weights/12")
)


@pytest.mark.parametrize("path", [STATE, WEIGHTS])
def test_a_checkpoint_path_is_what_it_was_parsed_from(path: str):
    parsed = CheckpointPath.parse(path)
    assert str(parsed) == path
    assert parsed.folder(Path("/root")) == Path("/root", parsed.key)


@pytest.mark.parametrize("path", [WEIGHTS, FROZEN_WEIGHTS])
def test_a_sampler_path_is_what_it_was_parsed_from(path: str):
    assert str(SamplerPath.parse(path)) == path


def test_the_frozen_weights_of_an_operation_are_named_by_its_seq_id():
    assert SamplerPath.frozen_weights("run-1", 12) == SamplerPath.parse(FROZEN_WEIGHTS)


def test_a_checkpoint_and_a_sampler_of_one_place_are_different_things():
    assert CheckpointPath.parse(WEIGHTS) != SamplerPath.parse(WEIGHTS)


NOWHERE = [
    "",
    "run-1/state/a",
    "GRADWIRE://run-1/state/a",
    "gradwire://",
    "gradwire:///state/a",
    "gradwire://run-1/state",
    "gradwire://run-1/state/",
    "gradwire://run-1/state/a/b",
    "gradwire://run-1/state/a\n",
    "gradwire://run-1/state/..",
    "gradwire://run-1/state/.a",
    "gradwire://../state/a",
    "gradwire://-run/state/a",
    "gradwire://run-1/other/a",
    "gradwire://run-1/state/é",
    "gradwire://run-1/state/" + "a" * 129,
    "gradwire://" + "r" * 65 + "/state/a",
    "gradwire://run-1/frozen_weights/0",
    "gradwire://run-1/frozen_weights/012",
    "gradwire://run-1/frozen_weights/a",
    "gradwire://run-1/frozen_weights/" + "1" * 20,
]


@pytest.mark.parametrize("path", [*NOWHERE, FROZEN_WEIGHTS])
def test_anything_else_is_no_checkpoint_path(path: str):
    with pytest.raises(InvalidArgumentError, match=r"^adapter_path is .*; it must be gradwire://"):
        CheckpointPath.parse(path, field="adapter_path")


@pytest.mark.parametrize("path", [*NOWHERE, STATE])
def test_anything_else_is_no_sampler_path(path: str):
    with pytest.raises(InvalidArgumentError, match=r"^model_path is .*; it must be gradwire://"):
        SamplerPath.parse(path)


def test_a_refusal_shows_no_more_of_a_path_than_can_be_read():
    with pytest.raises(InvalidArgumentError) as caught:
        CheckpointPath.parse("x" * 100_000)
    assert "… of 100000 characters" in caught.value.message
    assert len(caught.value.message) < 400


@pytest.mark.parametrize("name", ["a", "_", "-a.b_c", "a" * 128])
def test_a_checkpoint_name_becomes_a_path(name: str):
    check_checkpoint_name(name)
    assert CheckpointPath.parse(str(CheckpointPath("run-1", "state", name))).name == name


@pytest.mark.parametrize("name", ["", ".", "..", ".a", "a/b", "a\n", "é", "a" * 129])
def test_other_checkpoint_names_are_refused(name: str):
    with pytest.raises(InvalidArgumentError, match="^name is "):
        check_checkpoint_name(name)
