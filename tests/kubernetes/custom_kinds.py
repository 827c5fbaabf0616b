"""Kinds of JobSet's and Kubeflow's, whose definitions are in crds/; their controllers and webhooks are not here."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

_FOLDER = Path(__file__).parent / "crds"
_TRAINER_STEP = "trainer.kubeflow.org/trainjob-ancestor-step"
MAX_POD_NAME = 63


def definitions() -> list[Any]:
    """The CustomResourceDefinitions."""
    return [yaml.safe_load(path.read_text()) for path in sorted(_FOLDER.glob("*.yaml"))]


KINDS = {one["spec"]["names"]["kind"]: one for one in definitions()}


def plural(kind: str) -> str:
    """As a path of the API names it."""
    return KINDS[kind]["spec"]["names"]["plural"]


def validate(item: Any, version: str) -> None:
    """Checks an object against its definition, and Jobs within it against Kubernetes' own schema.

    Args:
        item: Of one of KINDS.
        version: Kubernetes', such as "1.27".

    Raises:
        Exception: It does not fit, with where and why; a field that the definition does not name does not fit either.
    """
    (known,) = KINDS[item["kind"]]["spec"]["versions"]
    assert item["apiVersion"] == f"{KINDS[item['kind']]['spec']['group']}/{known['name']}"
    jsonschema.Draft7Validator(_strict(known["schema"]["openAPIV3Schema"])).validate(item)
    for one in replicated_jobs(item):
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": one["name"]}, **one["template"]}
        kubernetes_validate.validate(job, version, strict=True)
        # What the validating webhooks of the two projects ask for beyond their schemas.
        assert one["replicas"] == 1
        last = one["template"]["spec"]["completions"] - 1
        assert len(f"{item['metadata']['name']}-{one['name']}-0-{last}-abcde") <= MAX_POD_NAME
        if item["kind"] == "TrainingRuntime":
            (container,) = one["template"]["spec"]["template"]["spec"]["containers"]
            assert one["template"]["metadata"]["labels"][_TRAINER_STEP] == "trainer"
            assert container["name"] == "node"


def replicated_jobs(item: Any) -> list[Any]:
    """The Jobs that an object describes, with their names."""
    spec = item["spec"]["template"]["spec"] if item["kind"] == "TrainingRuntime" else item["spec"]
    return spec.get("replicatedJobs", [])


def _strict(schema: Any) -> Any:
    """A schema in which fields that are not named are not allowed."""
    made = copy.deepcopy(schema)
    # Kubernetes' own, of which a definition says nothing.
    made["properties"]["metadata"]["x-kubernetes-preserve-unknown-fields"] = True
    for node in _nodes(made):
        if "properties" in node and not node.get("x-kubernetes-preserve-unknown-fields"):
            node["additionalProperties"] = False
    return made


def _nodes(schema: Any) -> Iterator[Any]:
    yield schema
    children = [*schema.get("properties", {}).values(), schema.get("items"), schema.get("additionalProperties")]
    for child in children:
        if isinstance(child, dict):
            yield from _nodes(child)
