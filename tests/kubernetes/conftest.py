"""What tests in a cluster share. Started by scripts/test_kubernetes.sh; without it they are skipped."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kubernetes.cluster import Cluster

KUBECONFIG = os.environ.get("GRADWIRE_TEST_KUBECONFIG", "")


@pytest.fixture(scope="session")
def kubeconfig() -> Path:
    """Of the cluster under test, as somebody who may do everything."""
    if not KUBECONFIG:
        pytest.skip("There is no API server; ./scripts/test_kubernetes.sh starts one, or takes yours (KUBECONFIG).")
    return Path(KUBECONFIG)


@pytest.fixture(scope="session")
def cluster(kubeconfig: Path) -> Cluster:
    """The cluster under test."""
    return Cluster(kubeconfig)


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace of the test's own."""
    name = cluster.make_namespace()
    yield name
    cluster.delete("v1", "namespaces", name)


@pytest.fixture(scope="session")
def helm() -> Path:
    """The helm binary."""
    return _tool("helm")


@pytest.fixture(scope="session")
def kubectl() -> Path:
    """The kubectl binary, which is kustomize as well."""
    return _tool("kubectl")


def _tool(name: str) -> Path:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"There is no {name} on PATH; ./scripts/test_kubernetes.sh has one.")
    try:
        subprocess.run(
            [found, "version", *(["--client"] if name == "kubectl" else [])], check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip(f"{found} does not run; ./scripts/test_kubernetes.sh has one that does.")
    return Path(found)
