"""Makes a CustomResourceDefinition of somebody else's small enough for tests/kubernetes/crds, on stdout:

    python scripts/kubernetes/trim_crd.py jobset.x-k8s.io_jobsets.yaml 'kubernetes-sigs/jobset v0.12.0' > …/jobsets.yaml

What goes: descriptions; the schema of Jobs and pods within it, which is Kubernetes' own and is checked as such; fields
that the chart does not set; and what an API server of 1.20 does not take (rules in CEL, defaults that are "", keys of
list maps).
"""

import sys
from pathlib import Path
from typing import Any

import yaml

_NOT_TAKEN = {"x-kubernetes-validations", "x-kubernetes-list-type", "x-kubernetes-list-map-keys", "selectableFields"}
_UNUSED = {"volumeClaimPolicies", "runtimePatches", "podTemplateOverrides", "initializer", "podGroupPolicy"}
_ANYTHING = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}


def trimmed(node: Any) -> Any:
    """A part of the definition without what goes."""
    if isinstance(node, list):
        return [trimmed(one) for one in node]
    if not isinstance(node, dict):
        return node
    kept = {
        name: trimmed(value)
        for name, value in node.items()
        if name not in _NOT_TAKEN
        and not (name == "description" and isinstance(value, str))
        and not (name == "default" and value == "")
    }
    properties = kept.get("properties", {})
    if "groupName" in properties and "replicas" in properties:
        properties["template"] = _ANYTHING
    for name in _UNUSED & set(properties):
        del properties[name]
    return kept


def main() -> int:
    file, source = sys.argv[1:]
    definition = trimmed(yaml.safe_load(Path(file).read_text()))
    for version in definition["spec"]["versions"]:
        version["schema"]["openAPIV3Schema"]["properties"].pop("status", None)
        version.pop("additionalPrinterColumns", None)
        version.pop("subresources", None)
    definition.pop("status", None)
    print(f"# {source}, Apache License 2.0, cut by scripts/kubernetes/trim_crd.py.")
    yaml.safe_dump(definition, sys.stdout, sort_keys=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
