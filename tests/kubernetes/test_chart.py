"""The Helm chart: what it renders is valid, says no more than it must, and what cannot be is refused in words."""

import copy
import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.kubernetes import custom_kinds
from tests.kubernetes.chart import CHART, GPU, NODES, OF_OTHERS, VALUE_SETS, one, rendered

VERSIONS = ("1.27", kubernetes_validate.latest_version())
"""The oldest that the chart says it takes, and the newest."""


@pytest.fixture(params=VALUE_SETS, ids=str)
def objects(request: pytest.FixtureRequest, helm: Path) -> list[Any]:
    """What the chart renders with one of the value sets, templates of jobs included."""
    return copy.deepcopy(_rendered_once(helm, request.param))


@functools.cache
def _rendered_once(helm: Path, values: str) -> list[Any]:
    found = rendered(helm, VALUE_SETS[values])
    for item in [item for item in found if item["kind"] == "ConfigMap"]:
        stateful_set, service = yaml.safe_load_all(item["data"]["trainer.yaml"])
        found += [_named(stateful_set), _named(service)]
    return found


def _named(template: Any) -> Any:
    template["metadata"]["name"] = "job-abcde"
    return template


def pods(objects: list[Any]) -> Iterator[Any]:
    for item in objects:
        if item["kind"] in ("StatefulSet", "Deployment"):
            yield item["spec"]["template"]
        elif item["kind"] in custom_kinds.KINDS:
            yield from (job["template"]["spec"]["template"] for job in custom_kinds.replicated_jobs(item))


def test_everything_is_valid_for_the_oldest_and_the_newest_kubernetes(objects: list[Any]):
    for item in objects:
        assert len(item["metadata"]["name"]) <= 63
        for version in VERSIONS:
            if item["kind"] in custom_kinds.KINDS:
                custom_kinds.validate(item, version)
            elif item["kind"] not in OF_OTHERS:
                kubernetes_validate.validate(item, version, strict=True)


def test_no_container_is_root_writes_to_its_image_or_gets_a_token_it_does_not_use(objects: list[Any]):
    for pod in pods(objects):
        security = pod["spec"]["securityContext"]
        assert security["runAsNonRoot"]
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        (container,) = pod["spec"]["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert pod["spec"]["automountServiceAccountToken"] is (container["name"] == "jobs")


def test_selectors_ports_and_names_lead_to_each_other(objects: list[Any]):
    labels = [pod["metadata"]["labels"] for pod in pods(objects)]
    for item in objects:
        spec = item.get("spec", {})
        if item["kind"] == "Service" and "selector" in spec:
            (found,) = (pod for pod in pods(objects) if spec["selector"].items() <= pod["metadata"]["labels"].items())
            names = {port["name"] for port in found["spec"]["containers"][0]["ports"]}
            assert {port["targetPort"] for port in spec["ports"]} <= names
        if item["kind"] in ("NetworkPolicy", "PodDisruptionBudget"):
            selector = (spec.get("podSelector") or spec["selector"])["matchLabels"]
            assert sum(selector.items() <= pod.items() for pod in labels) == 1
    accounts = {item["metadata"]["name"] for item in objects if item["kind"] == "ServiceAccount"}
    for pod in pods(objects):
        assert pod["spec"]["serviceAccountName"] in accounts
        mounted = {mount["name"] for mount in pod["spec"]["containers"][0]["volumeMounts"]}
        assert {volume["name"] for volume in pod["spec"]["volumes"]} <= mounted


def test_a_pod_has_time_to_drain(objects: list[Any]):
    for item in objects:
        if item["kind"] == "StatefulSet" and item["spec"]["template"]["spec"]["containers"][0]["name"] == "trainer":
            spec = item["spec"]["template"]["spec"]
            (drain,) = (arg for arg in spec["containers"][0]["args"] if arg.startswith("--drain-timeout-s="))
            assert int(drain.partition("=")[2]) + 15 <= spec["terminationGracePeriodSeconds"]


def test_the_trainer_takes_every_option_that_is_rendered(objects: list[Any], monkeypatch: pytest.MonkeyPatch):
    from trainer_service.__main__ import _parser

    monkeypatch.setenv("GRADWIRE_HOME", "/nowhere")
    for pod in pods(objects):
        args = pod["spec"]["containers"][0]["args"]
        if args[0] == "serve" and not any(arg.startswith("--base-model=") for arg in args):
            args = [*args, "--base-model=what-a-job-asks-for"]
        _parser().parse_args(args)


def test_gpus_are_limits_that_their_nodes_taint_is_borne_for(helm: Path):
    pod = one(rendered(helm, GPU), "StatefulSet")["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]
    assert {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}} in pod["volumes"]


def test_a_pod_with_several_gpus_has_a_rank_for_each_and_memory_for_them_to_talk_through(helm: Path):
    objects = rendered(helm, VALUE_SETS["several GPUs"])
    pod = one(objects, "StatefulSet")["spec"]["template"]["spec"]
    assert "--nproc-per-node=8" in pod["containers"][0]["args"]
    assert {"name": "shared-memory", "emptyDir": {"medium": "Memory"}} in pod["volumes"]
    job, _ = yaml.safe_load_all(one(objects, "ConfigMap")["data"]["trainer.yaml"])
    assert "--nproc-per-node=8" in job["spec"]["template"]["spec"]["containers"][0]["args"]


def test_metrics_and_clients_reach_what_the_policy_names_and_no_more(helm: Path):
    policy = one(rendered(helm, {}), "NetworkPolicy")
    assert [rule["ports"] for rule in policy["spec"]["ingress"]] == [[{"port": "grpc"}]]
    policy = one(rendered(helm, VALUE_SETS["narrow network"]), "NetworkPolicy")
    assert [rule["ports"][0]["port"] for rule in policy["spec"]["ingress"]] == ["grpc", "metrics"]


def test_the_gateway_reaches_the_trainer_whoever_else_may_not(helm: Path):
    sets = {"gateway": {"enabled": True}, **VALUE_SETS["narrow network"]}
    objects = rendered(helm, sets)
    (gateway,) = (pod for pod in pods(objects) if pod["spec"]["containers"][0]["name"] == "gateway")
    assert "--trainer=http://gradwire.training.svc:7777" in gateway["spec"]["containers"][0]["args"]
    clients = one(objects, "NetworkPolicy", "gradwire-trainer")["spec"]["ingress"][0]["from"]
    assert {"podSelector": {"matchLabels": gateway["metadata"]["labels"]}} in clients
    policy = one(objects, "NetworkPolicy", "gradwire-gateway")
    assert [rule["ports"] for rule in policy["spec"]["ingress"]] == [[{"port": "http"}]]


def test_objects_of_others_have_the_fields_their_operators_read(helm: Path):
    objects = rendered(helm, {**VALUE_SETS["gateway api"], **VALUE_SETS["prometheus operator"]})
    route, monitor = one(objects, "GRPCRoute"), one(objects, "ServiceMonitor")
    assert route["apiVersion"] == "gateway.networking.k8s.io/v1"
    assert route["spec"]["rules"] == [{"backendRefs": [{"name": "gradwire", "port": 7777}]}]
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert monitor["spec"]["endpoints"] == [{"port": "metrics", "interval": "15s"}]
    assert monitor["metadata"]["labels"]["release"] == "prometheus"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"trainer": {"nodes": {"count": 2}}}, "trainer.persistence.accessMode must be ReadWriteMany"),
        ({**NODES, "tls": {"secretName": "a", "clientCa": True}}, "Set trainer.nodes.tls.secretName"),
        ({"trainer": {"nodes": {"tls": {"secretName": "a"}}}}, "a trainer with tls.clientCa, which is false"),
        (
            {"trainer": {**NODES["trainer"], "enabled": False}, "jobs": {"enabled": True}},
            "trainer.nodes.count is 2, but trainer.enabled is false",
        ),
        (
            {"jobs": {"enabled": True, "trainer": {"nodes": {"count": 2}}}},
            "jobs.trainer.nodes.count is 2; a trainer job runs on one node",
        ),
        ({"trainer": {"nodes": {"kind": "PyTorchJob"}}}, "/trainer/nodes/kind"),
        ({"trainer": {"nodes": {"count": 1025}}}, "/trainer/nodes/count"),
        ({"trainer": {"drainSeconds": 300}}, "it must be at least drainSeconds and 15 more, 315"),
        ({"tls": {"clientCa": True}}, "tls.clientCa needs tls.secretName"),
        ({"auth": {"secretName": ""}}, "Nothing says who may call"),
        ({"grpcRoute": {"enabled": True}}, "grpcRoute.enabled needs grpcRoute.parentRefs"),
        (
            {"page": {"enabled": True}, "auth": {"allowNoApiKey": True, "secretName": ""}},
            "page.enabled needs auth.secretName",
        ),
        ({"gateway": {"enabled": True}, "trainer": {"enabled": False}}, "needs gateway.trainers"),
        (
            {"gateway": {"enabled": True}, "tls": {"secretName": "a", "clientCa": True}},
            "show API keys, not certificates",
        ),
        ({"gateway": {"httpRoute": {"enabled": True}}}, "gateway.httpRoute.enabled needs gateway.httpRoute.parentRefs"),
        ({"gateway": {"trainers": ["one.example.org"]}}, "/gateway/trainers/0"),
        ({"jobs": {"enabled": True}, "trainer": {"persistence": {"existingClaim": "x"}}}, "a volume of its own"),
        ({"trainer": {"persistence": {"size": "10Gb"}}}, "/trainer/persistence/size"),
        ({"trainer": {"resources": {"limits": {"memory": "lots"}}}}, "/trainer/resources/limits/memory"),
        ({"trainer": {"nodeSelector": {"zone": "x" * 64}}}, "/trainer/nodeSelector/zone"),
        ({"image": {"digest": "latest"}}, "/image/digest"),
        ({"fullnameOverride": "a" * 46}, "/fullnameOverride"),
        ({"service": {"port": 70000}}, "/service/port"),
    ],
)
def test_what_cannot_be_is_refused_in_words(helm: Path, values: dict[str, Any], said: str):
    with pytest.raises(AssertionError) as refused:
        rendered(helm, values)
    assert said in str(refused.value)


def values() -> Any:
    return yaml.safe_load((CHART / "values.yaml").read_text())


def paths(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Of every value, groups of values included."""
    for name, value in tree.items():
        yield (*path, name)
        if isinstance(value, dict):
            yield from paths(value, (*path, name))


def test_a_misspelt_value_is_refused_wherever_it_stands(helm: Path):
    free = {("trainer", "resources"), ("jobs", "resources"), ("gateway", "resources")}
    groups = {path[:-1] for path in paths(values())} - {path for path in paths(values()) if path[:-1] in free}
    for group in sorted(groups - free):
        misspelt: Any = {"mispelt": 1}
        for name in reversed(group):
            misspelt = {name: misspelt}
        with pytest.raises(AssertionError, match="additional properties 'mispelt' not allowed"):
            rendered(helm, misspelt)


def test_the_schema_and_the_values_name_the_same_things():
    schema = json.loads((CHART / "values.schema.json").read_text())

    def named(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]] if "$ref" in node else node
        for name, child in node.get("properties", {}).items():
            yield (*path, name)
            yield from named(child, (*path, name))

    # The values of jobs' trainers are those of `trainer`, none of them set; a claims list is Kubernetes' own.
    known = {path for path in named(schema, ()) if path[:2] != ("jobs", "trainer") and path != ("global",)}
    known = {path for path in known if path[-1] != "claims"}
    known = {path for path in known if "resources" not in path[:-1]}
    assert known == {
        path for path in paths(values()) if "resources" not in path[:-1] and path[:2] != ("jobs", "trainer")
    }


def test_every_value_is_commented():
    lines = (CHART / "values.yaml").read_text().splitlines()
    groups = {path[-1] for path in paths(values()) if path in {child[:-1] for child in paths(values())}}
    for before, line in zip(["", *lines], lines, strict=False):
        name = line.strip().partition(":")[0]
        if line.strip() and not line.strip().startswith("#") and ":" in line:
            said = before.strip().startswith("#")
            # A group is told of by what stands in it.
            assert said or name in groups or line.startswith(("      ", "    requests")), line


def test_helm_lint_has_nothing_to_say(helm: Path):
    run = subprocess.run([str(helm), "lint", "--strict", str(CHART)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "[WARNING]" not in run.stdout


def test_the_manifests_are_what_the_chart_renders(helm: Path, kubectl: Path):
    root = CHART.parents[2]
    script = root / "scripts" / "kubernetes" / "render_manifests.py"
    run = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    folders = [path.parent for path in (root / "deploy" / "manifests").glob("*/kustomization.yaml")]
    assert len(folders) == 4
    for where in folders:
        run = subprocess.run([str(kubectl), "kustomize", str(where)], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        built = [item for item in yaml.safe_load_all(run.stdout) if item]
        assert len(built) == len(list(yaml.safe_load_all((where / "gradwire.yaml").read_text())))
        for item in built:
            if item["kind"] in custom_kinds.KINDS:
                custom_kinds.validate(item, VERSIONS[-1])
            else:
                kubernetes_validate.validate(item, VERSIONS[-1], strict=True)


def test_a_value_set_is_left_as_it_was(helm: Path):
    """Rendering jobs merges values; a chart that did so in place would change the trainer beside them."""
    sets = copy.deepcopy(VALUE_SETS["jobs"])
    sets["jobs"]["trainer"] = {"drainSeconds": 1, "gpu": {"count": 1}}
    spec = one(rendered(helm, sets), "StatefulSet")["spec"]["template"]["spec"]
    assert "--drain-timeout-s=60" in spec["containers"][0]["args"]
    assert "nvidia.com/gpu" not in spec["containers"][0]["resources"]["limits"]


def test_the_documents_name_values_that_there_are():
    known = {".".join(path) for path in paths(values())}
    of_trainer = {f"jobs.{name}" for name in known if name.startswith("trainer.")}
    text = "".join((CHART.parents[2] / name).read_text() for name in ("docs/kubernetes.md", "deploy/README.md"))
    tops = "|".join(values())
    named = set(re.findall(rf"(?<![\w./-])((?:{tops})\.[A-Za-z.]+[A-Za-z])(?![\w/(])", text))
    named -= {"tls.crt", "tls.key"}  # Keys of a Secret.
    assert len(named) > 10
    for name in named:
        # `job.…` and objects' own fields are no values; below a free-form value anything goes.
        free = any(name.startswith(f"{one}.") for one in known if not any(k.startswith(f"{one}.") for k in known))
        assert name in known | of_trainer or free, name
