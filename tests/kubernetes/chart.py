"""What the Helm chart renders."""

import subprocess
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parents[2] / "deploy" / "helm" / "gradwire"


def rendered(
    helm: Path, values: dict[str, Any], *, namespace: str = "training", release: str = "gradwire"
) -> list[Any]:
    """The objects that a release with these values is made of.

    Raises:
        AssertionError: Helm refused, with what it said.
    """
    command = [str(helm), "template", release, str(CHART), f"--namespace={namespace}", "--values=-"]
    run = subprocess.run(command, input=yaml.safe_dump(values), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return [one for one in yaml.safe_load_all(run.stdout) if one]


def one(objects: list[Any], kind: str, name: str = "") -> Any:
    """The only object of a kind, or of a kind and name."""
    (found,) = (item for item in objects if item["kind"] == kind and name in ("", item["metadata"]["name"]))
    return found
