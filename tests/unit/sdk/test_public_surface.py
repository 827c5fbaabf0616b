"""What users hold or catch is exported from `gradwire`, and documented."""

import ast
import builtins
import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradwire
import pytest
from gradwire import errors

ROOT = Path(__file__).parents[3]
EXPORTED = {name: getattr(gradwire, name) for name in gradwire.__all__}
CLASSES = sorted({value for value in EXPORTED.values() if inspect.isclass(value)}, key=lambda one: one.__name__)
MADE_BY_OTHERS = {
    gradwire.APIFuture,
    gradwire.CheckpointClient,
    gradwire.RestClient,
    gradwire.SamplingClient,
    gradwire.TrainingClient,
}
"""Users get these from a call, so their `__init__` is not for them."""
NOT_LOADED = {"torch": types.SimpleNamespace(Tensor=object)}


def named_in(annotation: Any) -> Iterator[type]:
    """Every class that an annotation names, inside lists, unions and callables too."""
    if isinstance(annotation, list | tuple):
        for part in annotation:
            yield from named_in(part)
    elif (arguments := typing.get_args(annotation)) and typing.get_origin(annotation) is not typing.Literal:
        yield from named_in(typing.get_origin(annotation))
        yield from named_in(arguments)
    elif inspect.isclass(annotation):
        yield annotation


def annotated(owner: Any) -> Iterator[tuple[str, Any]]:
    """(place, annotation) of everything public of a class."""
    title = owner.__name__
    if dataclasses.is_dataclass(owner):
        yield from ((f"{title}.{name}", one) for name, one in typing.get_type_hints(owner).items())
    for name, member in inspect.getmembers(owner):
        if name.startswith("_") and (name != "__init__" or owner in MADE_BY_OTHERS or dataclasses.is_dataclass(owner)):
            continue
        function: Any = member.fget if isinstance(member, property) else member
        if inspect.isfunction(inspect.unwrap(function)) and function.__module__.startswith("gradwire"):
            hints = typing.get_type_hints(function, localns=NOT_LOADED)
            yield from ((f"{title}.{name}", one) for one in hints.values())
        elif inspect.ismethod(function):
            hints = typing.get_type_hints(function.__func__, localns=NOT_LOADED)
            yield from ((f"{title}.{name}", one) for one in hints.values())


def unexported(places: Iterator[tuple[str, Any]]) -> set[str]:
    """Classes of ours that a user meets there and cannot name; stubs of protos/ are never for users."""
    return {
        f"{place} names {named.__module__}.{named.__qualname__}"
        for place, annotation in places
        for named in named_in(annotation)
        if named.__module__.split(".")[0] == "gradwire" and named not in CLASSES
    }


@pytest.mark.parametrize("owner", CLASSES, ids=lambda owner: owner.__name__)
def test_every_class_that_a_public_method_names_is_exported(owner: type):
    assert unexported(annotated(owner)) == set()


def test_every_class_that_an_exported_function_names_is_exported():
    functions = {name: value for name, value in EXPORTED.items() if inspect.isfunction(value)}
    assert functions
    hints = [(name, one) for name, value in functions.items() for one in typing.get_type_hints(value).values()]
    assert unexported(iter(hints)) == set()


def test_the_walk_finds_what_is_not_exported():
    from gradwire._client.transport import Connection
    from gradwire.v1.run_pb2 import Run

    class Holder:
        def call(self, connection: Connection | None) -> "list[dict[str, Run]]": ...

    Holder.call.__module__ = "gradwire"
    Holder.call.__annotations__ = {"connection": Connection | None, "return": list[dict[str, Run]]}
    assert {said.rpartition(".")[2] for said in unexported(annotated(Holder))} == {"Connection", "Run"}


@pytest.mark.parametrize("owner", CLASSES, ids=lambda owner: owner.__name__)
def test_every_error_that_a_docstring_names_can_be_caught_by_its_exported_name(owner: type):
    documented = [owner, *(member for name, member in inspect.getmembers(owner) if name[0] != "_")]
    named = {
        name
        for one in documented
        if "gradwire" in (getattr(one, "__module__", None) or "")
        for name in re.findall(r"\b[A-Z]\w*Error\b", inspect.getdoc(one) or "")
    }
    assert {name for name in named if name not in EXPORTED and not hasattr(builtins, name)} == set()


def test_every_error_is_exported():
    found = {name for name, value in vars(errors).items() if inspect.isclass(value) and name[0] != "_"}
    assert {name for name in found if name.endswith("Error")} - set(EXPORTED) == set()


def test_every_exported_name_is_on_the_page_of_the_python_interface():
    page = (ROOT / "docs" / "python.md").read_text()
    shown = set(re.findall(r"^::: gradwire\.(\w+)$", page, re.MULTILINE))
    assert "errors" in shown
    known = [EXPORTED[name] for name in shown - {"errors"}]
    others = {"__version__", "types", "StopReason", "TensorDtype"}
    missing = {
        name
        for name, value in EXPORTED.items()
        # An alias is shown under its class's own name, and errors are shown as one tree.
        if value not in known and name not in others and getattr(value, "__module__", "") != "gradwire.errors"
    }
    assert missing == set()


def documented_fields(owner: type) -> set[str]:
    """Fields with a docstring beneath, or a line under Attributes."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
    assert isinstance(tree, ast.ClassDef)
    beneath = {
        first.target.id
        for first, then in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(first, ast.AnnAssign) and isinstance(first.target, ast.Name)
        if isinstance(then, ast.Expr) and isinstance(then.value, ast.Constant) and isinstance(then.value.value, str)
    }
    return beneath | set(re.findall(r"^\s+(\w+): ", (inspect.getdoc(owner) or "").partition("Attributes:")[2], re.M))


@pytest.mark.parametrize("owner", [*filter(dataclasses.is_dataclass, CLASSES)], ids=lambda owner: owner.__name__)
def test_every_field_of_a_value_is_documented(owner: type):
    assert {field.name for field in dataclasses.fields(owner) if field.name != "_"} - documented_fields(owner) == set()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "owner", [gradwire.ServerInfo, gradwire.ModelInfo, gradwire.LossInfo, gradwire.Limits, gradwire.ListedRun]
)
def test_what_a_trainer_says_of_itself_is_frozen(owner: Any):
    assert owner.__dataclass_params__.frozen
