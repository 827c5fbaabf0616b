"""Renders deploy/manifests, which kustomize takes, from the chart; --check compares and changes nothing.

python scripts/kubernetes/render_manifests.py [--check]
"""

import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "deploy" / "helm" / "gradwire"
MANIFESTS = ROOT / "deploy" / "manifests"
VALUES = {
    "trainer": [],
    "trainer-and-gateway": ["--set=gateway.enabled=true"],
    "trainer-and-jobs": ["--set=jobs.enabled=true"],
    "trainer-on-two-nodes": [
        "--set=trainer.nodes.count=2",
        # A Secret of the cluster's own, since a rendered token would be everybody's.
        "--set=trainer.nodes.joinToken.secretName=gradwire-join-token",
        "--set=trainer.gpu.count=8",
        "--set=trainer.baseModel=Qwen/Qwen3-8B",
        "--set=trainer.resources.requests.cpu=32,trainer.resources.requests.memory=256Gi",
        "--set=trainer.resources.limits.memory=512Gi",
        "--set=trainer.persistence.accessMode=ReadWriteMany",
    ],
}
"""Folder to the values it is rendered with."""
_HELMS_OWN = ("helm.sh/chart", "app.kubernetes.io/managed-by")
_HEAD = "# Rendered from deploy/helm/gradwire by scripts/kubernetes/render_manifests.py; change the chart, not this.\n"


def render(folder: str, helm: str) -> str:
    """What the folder's gradwire.yaml holds.

    Args:
        folder: Of VALUES.
        helm: The binary.
    """
    command = [helm, "template", "gradwire", str(CHART), "--namespace=gradwire", *VALUES[folder]]
    rendered = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    objects = [one for one in yaml.safe_load_all(rendered) if one]
    for one in objects:
        for label in _HELMS_OWN:
            one["metadata"]["labels"].pop(label, None)
    objects.sort(key=lambda one: (one["kind"], one["metadata"]["name"]))
    return _HEAD + yaml.safe_dump_all(objects, sort_keys=False, width=120)


def main() -> int:
    helm = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("helm.py"))], check=True, stdout=subprocess.PIPE, text=True
    ).stdout.strip()
    stale = []
    for folder in VALUES:
        path, text = MANIFESTS / folder / "gradwire.yaml", render(folder, helm)
        if path.exists() and path.read_text() == text:
            continue
        stale.append(str(path.relative_to(ROOT)))
        if "--check" not in sys.argv:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
    if stale and "--check" in sys.argv:
        print(f"{', '.join(stale)}: not what the chart renders; run {Path(__file__).name}.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
