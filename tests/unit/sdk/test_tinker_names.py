"""Every name of tinker's that loops use is here with its arguments, or is refused with a reason."""

import dataclasses
import inspect
from typing import Any

import gradwire
import pytest
from gradwire._client.ported_names import REFUSED
from gradwire.errors import InvalidArgumentError

from tests.tinker_surface import CALLS, MEMBERS, PACKAGE, TWINS, TYPES

CLASSES: dict[str, type[Any]] = {
    "ServiceClient": gradwire.ServiceClient,
    "TrainingClient": gradwire.TrainingClient,
    "SamplingClient": gradwire.SamplingClient,
    "RestClient": gradwire.RestClient,
    "APIFuture": gradwire.APIFuture,
}
EVERY_CALL = [(owner, name) for owner, calls in CALLS.items() for name in calls]


def refusal(owner: str, name: str) -> str | None:
    return REFUSED.get(owner, {}).get(name.removesuffix("_async"))


def kept(owner: str) -> list[str]:
    return [name for name in CALLS[owner] if refusal(owner, name) is None]


def test_the_table_is_not_empty():
    assert sum(len(calls) for calls in CALLS.values()) > 60
    assert {"forward_backward", "optim_step", "save_state"} <= set(kept("TrainingClient"))


@pytest.mark.parametrize(("owner", "name"), EVERY_CALL)
def test_every_call_is_here_or_refused_with_a_reason(owner: str, name: str):
    reason = refusal(owner, name)
    assert hasattr(CLASSES[owner], name) is (reason is None)
    assert reason is None or reason.endswith(".")


def test_nothing_is_refused_that_is_not_tinkers():
    """The list says what there is not, and nothing that nobody asks for."""
    for owner, names in REFUSED.items():
        known = set(PACKAGE.split()) | {"ExperimentalWarning"} if owner == "gradwire" else set(CALLS[owner])
        assert set(names) - known == set(), owner


@pytest.mark.parametrize(("owner", "name"), [call for call in EVERY_CALL if refusal(*call) is None])
def test_every_call_takes_tinkers_arguments_in_tinkers_order(owner: str, name: str):
    ours = list(inspect.signature(getattr(CLASSES[owner], name)).parameters.values())[1:]
    by_name = {parameter.name: parameter for parameter in ours}
    theirs = CALLS[owner][name].split(", ") if CALLS[owner][name] else []
    positional = theirs[: theirs.index("*")] if "*" in theirs else theirs
    named = {text.removesuffix("="): text.endswith("=") for text in theirs if text != "*"}
    if (owner, name) == ("ServiceClient", "__init__"):
        # Loops give them by name; base_url comes first here, and headers are HTTP's.
        positional = []
        del named["default_headers_overrides"]
    missing = [argument for argument in named if argument not in by_name]
    assert missing == []
    in_order = [parameter.name for parameter in ours if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    assert in_order[: len(positional)] == [text.removesuffix("=") for text in positional]
    empty = inspect.Parameter.empty
    for parameter in ours:
        assert parameter.default is not empty or named.get(parameter.name) is False, parameter.name
    for argument, has_default in named.items():
        assert not has_default or by_name[argument].default is not empty, argument


@pytest.mark.parametrize(("owner", "name"), [(owner, name) for owner in TWINS for name in TWINS[owner].split()])
def test_every_twin_is_a_coroutine_function_with_its_calls_arguments(owner: str, name: str):
    call, twin = getattr(CLASSES[owner], name, None), getattr(CLASSES[owner], f"{name}_async", None)
    if refusal(owner, name):
        assert (call, twin) == (None, None)
        return
    assert call is not None
    assert twin is not None
    assert inspect.iscoroutinefunction(twin)
    assert inspect.signature(twin) == inspect.signature(call)
    if owner != "APIFuture":
        assert (twin.__name__, twin.__doc__) == (f"{name}_async", call.__doc__)


def test_all_our_own_calls_have_twins_too():
    for owner in ("ServiceClient", "TrainingClient", "SamplingClient"):
        calls = {name for name, value in vars(CLASSES[owner]).items() if inspect.isfunction(value) and name[0] != "_"}
        # They do not wait, but for stream, which is an iterator.
        without = {"close", "stream", "create_rest_client"}
        alone = {name for name in calls if not name.endswith("_async") and f"{name}_async" not in calls}
        assert alone == without & calls


def test_every_name_of_the_package_is_here_or_refused_with_a_reason():
    for name in PACKAGE.split():
        reason = REFUSED["gradwire"].get(name)
        assert hasattr(gradwire, name) is (reason is None), name
    with pytest.raises(AttributeError, match="gradwire has no DimuonParams: runs are trained with AdamW"):
        _ = getattr(gradwire, "DimuonParams")  # noqa: B009
    with pytest.raises(AttributeError, match=r"gradwire has no nonsense\.$"):
        _ = getattr(gradwire, "nonsense")  # noqa: B009


def test_every_type_and_its_members_are_here():
    for name in TYPES.split():
        assert hasattr(gradwire.types, name), name
    for name, members in MEMBERS.items():
        made = getattr(gradwire.types, name)
        fields = {field.name for field in dataclasses.fields(made)} if dataclasses.is_dataclass(made) else set()
        assert [member for member in members.split() if member not in fields and not hasattr(made, member)] == [], name


def test_a_refused_name_says_why_and_any_other_is_missing_as_ever():
    service = gradwire.ServiceClient("http://127.0.0.1:1")
    assert not hasattr(service, "get_console_url")
    with pytest.raises(AttributeError, match="ServiceClient has no get_console_url: there is no console"):
        service.get_console_url()  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=r"RestClient has no whoami: .*--api-key-file"):
        service.create_rest_client().whoami()  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match=r"ServiceClient has no nonsense\.$"):
        service.nonsense()  # type: ignore[attr-defined]
    service.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"project_id": "p"}, "project_id is 'p'; leave it out: there are no projects"),
        (
            {"user_metadata": {"epoch": 3}},
            r"user_metadata\['epoch'\] is 3; keys and values must be texts",
        ),
        ({"user_metadata": {3: "epoch"}}, r"user_metadata\[3\] is 'epoch'"),
        ({"user_metadata": "text"}, "user_metadata is a str; it must be a dict of texts"),
        ({"user_metadata": {"a": "\ud800"}}, "no text that UTF-8 can carry"),
    ],
)
def test_arguments_that_mean_nothing_here_are_refused_by_name(arguments: dict[str, Any], message: str):
    with pytest.raises(InvalidArgumentError, match=message):
        gradwire.ServiceClient("http://127.0.0.1:1", **arguments)
