"""What tests in a cluster share. Started by scripts/test_kubernetes.sh; without it they are skipped."""

import functools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from kubernetes.client.exceptions import ApiException

from tests.kubernetes import custom_kinds
from tests.kubernetes.cluster import Cluster, eventually
from tests.kubernetes.control_plane import IMAGE
from tests.kubernetes.kubelet import FakeKubelet, none_of_its_own

KUBECONFIG = os.environ.get("GRADWIRE_TEST_KUBECONFIG", "")
_NO_CLUSTER = "There is no API server; ./scripts/test_kubernetes.sh starts one, or takes yours (KUBECONFIG)."
_NO_TOOLS = "There is no helm or no kubectl that runs; ./scripts/test_kubernetes.sh has both."


@pytest.hookimpl(tryfirst=True)  # Before pytest-xdist looks at the groups.
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what cannot be, by marks: pytest then tells each reason once a file. Says what goes together."""
    runs = {name: _tool(name) is not None for name in ("helm", "kubectl")}
    for item in items:
        if not item.path.is_relative_to(Path(__file__).parent):
            continue
        needed = getattr(item, "fixturenames", ())
        # For several processes: a file shares what it renders, and one alone makes the kinds of others.
        group = "kinds of others" if "kinds_of_others" in needed else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))
        if "cluster" in needed and not KUBECONFIG:
            item.add_marker(pytest.mark.skip(reason=_NO_CLUSTER))
        elif not all(there for name, there in runs.items() if name in needed):
            item.add_marker(pytest.mark.skip(reason=_NO_TOOLS))


@pytest.fixture(scope="session")
def kubeconfig() -> Path:
    """Of the cluster under test, as somebody who may do everything."""
    return Path(KUBECONFIG)


@pytest.fixture(scope="session")
def cluster(kubeconfig: Path) -> Cluster:
    """The cluster under test."""
    return Cluster(kubeconfig)


@pytest.fixture(scope="session")
def kinds_of_others(cluster: Cluster) -> Iterator[None]:
    """The cluster knows the kinds of JobSet and of Kubeflow; their controllers are the cluster's own, or not there."""
    api, plural = "apiextensions.k8s.io/v1", "customresourcedefinitions"
    there = {item["metadata"]["name"] for item in cluster.list(api, plural)}
    made = [one for one in custom_kinds.definitions() if one["metadata"]["name"] not in there]
    for one in made:
        cluster.create(api, plural, one)
    for one in custom_kinds.definitions():
        group, version = one["spec"]["group"], one["spec"]["versions"][0]["name"]
        eventually(functools.partial(_serves, cluster, f"{group}/{version}", one["spec"]["names"]["plural"]))
    yield
    for one in made:
        cluster.delete(api, plural, one["metadata"]["name"])


def _serves(cluster: Cluster, api: str, plural: str) -> bool:
    try:
        cluster.list(api, plural)
    except ApiException as exc:
        if exc.status != 404:
            raise
        return False
    return True


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A namespace of the test's own."""
    name = cluster.make_namespace()
    yield name
    cluster.delete("v1", "namespaces", name)


@pytest.fixture
def kubelet(cluster: Cluster, namespace: str, tiny_llama: Path, tmp_path: Path) -> Iterator[FakeKubelet]:
    """Runs the commands of the namespace's pods as processes."""
    none_of_its_own(cluster)
    kubelet = FakeKubelet(cluster, namespace, tmp_path, images={IMAGE}, files={"/models": tiny_llama.parent})
    yield kubelet
    kubelet.close()


@pytest.fixture(scope="session")
def helm() -> Path:
    """The helm binary."""
    return Path(_tool("helm") or "")


@pytest.fixture(scope="session")
def kubectl() -> Path:
    """The kubectl binary, which is kustomize as well."""
    return Path(_tool("kubectl") or "")


@functools.cache
def _tool(name: str) -> str | None:
    """Where a binary is that runs."""
    found = shutil.which(name)
    if found is None:
        return None
    version = [found, "version", *(["--client"] if name == "kubectl" else [])]
    try:
        subprocess.run(version, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found
