"""What can be said of the Dockerfile without a Docker engine; scripts/check_dockerfile.py runs its steps."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def checker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check_dockerfile", ROOT / "scripts" / "check_dockerfile.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def text() -> str:
    return (ROOT / "Dockerfile").read_text()


def test_every_base_is_pinned_by_its_digest(checker: ModuleType, text: str):
    arguments, stages = checker.parse(text)
    for stage in stages:
        base = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], stage.base)
        assert re.fullmatch(r"[\w./-]+:[\w.-]+@sha256:[0-9a-f]{64}", base), base


def test_what_is_copied_is_there_and_not_ignored(checker: ModuleType, text: str):
    _, stages = checker.parse(text)
    names = {stage.name for stage in stages}
    for step in (step for stage in stages for step in stage.steps if step.name == "COPY"):
        *sources, _ = step.text.split()
        if sources[0].startswith("--from="):
            assert sources[0].removeprefix("--from=") in names
            continue
        for source in sources:
            assert (ROOT / source).exists(), source
            assert not checker.ignored(source, checker.dockerignore()), source


def test_what_is_not_of_the_image_is_ignored(checker: ModuleType):
    patterns = checker.dockerignore()
    for path in ("tests/conftest.py", ".git/config", "models/x", ".venv/bin/python", "sdk/gradwire/__pycache__"):
        assert checker.ignored(path, patterns), path
    assert not checker.ignored("sdk/gradwire/__init__.py", patterns)


def test_packages_come_from_the_pins_and_the_dependency_layer_knows_nothing_of_our_code(checker: ModuleType, text: str):
    _, stages = checker.parse(text)
    for stage in stages:
        for step in stage.steps:
            if step.name == "RUN":
                for command in re.findall(r"pip(?: --python \S+)? install[^;&]*", step.text):
                    assert "--constraint constraints.txt" in command or "--no-deps" in command, command
    copied = {step.text.split()[0] for step in stages[0].steps if step.name == "COPY"}
    assert copied == {"constraints.txt", "pyproject.toml"}


def test_the_image_runs_as_nobody_special_and_is_asked_for_its_health(checker: ModuleType, text: str):
    _, stages = checker.parse(text)
    last = {step.name: step.text for step in stages[-1].steps}
    assert last["USER"] == "10001", "a number, so that a cluster can tell that it is not root"
    assert json.loads(last["ENTRYPOINT"])[-2:] == ["-m", "trainer_service"]
    (script,) = (part for part in json.loads(last["HEALTHCHECK"].partition("CMD ")[2]) if part.endswith(".py"))
    assert f"COPY scripts/healthcheck.py {script}" in text
    chart = (ROOT / "deploy" / "helm" / "gradwire" / "templates" / "_helpers.tpl").read_text()
    assert f"runAsUser: {last['USER']}" in chart
