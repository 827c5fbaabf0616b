"""Settings of the processes, each declared once: its default, its bounds, and the help of its option. Ground floor."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer_service import user_metadata
from trainer_service.addresses import join_address
from trainer_service.command_lines import SettingsError, folder, option, options_of
from trainer_service.worker_config import ModelSettings, WorkerTimeouts

PAGE_CONNECTIONS = 512
"""Simultaneous connections to the live page; beyond them it answers 503. A page keeps one open and uses a second for
requests."""


@dataclass(frozen=True)
class Limits:
    """The most a client may send; announced by GetServerInfo."""

    max_message_bytes: int = 64 * 1024 * 1024
    """One message, either way."""
    target_message_bytes: int = 1024 * 1024
    """Size at which the SDK splits batches: gRPC moves larger messages more slowly, smaller ones add overhead."""
    max_in_flight_operations: int = 64
    """Operations of one run sent and not yet answered; beyond it the trainer stops reading."""
    max_runs: int = option(
        8,
        help="runs held at once; each full-parameter run has its own parameters, gradients and optimizer state",
        at_least=1,
    )
    max_runs_per_key: int = option(0, help="of those, runs of one API key; 0: only --max-runs counts", at_least=0)
    max_disk_bytes: int = option(0, help="size of --data-dir from which saves are refused; 0: no limit", at_least=0)
    max_datums: int = 65_536
    """Sequences in one operation."""
    max_tokens: int = 4_194_304
    """Tokens in one operation."""
    max_num_samples: int = 128
    """Samples of one Sample request."""
    max_topk_logprobs: int = 128
    """Most likely tokens requested at one position."""
    max_sample_requests: int = 1024
    """Simultaneous Sample and ComputeLogprobs requests of all clients together; beyond that, each owner may still have
    half an equal share."""
    max_frozen_weights: int = 4
    """Sets of frozen weights of one run; a further one replaces the one unused for longest that nobody holds open."""
    max_user_metadata_entries: int = user_metadata.MAX_ENTRIES
    """Entries of one user_metadata."""
    max_user_metadata_bytes: int = user_metadata.MAX_BYTES
    """Size of its keys and values together."""
    max_message_fields: int = 65_536
    """Fields of one message, including nested ones. Counted before parsing, whose time grows with them. Data sent as
    `batch` have a dozen."""
    max_name_bytes: int = 4096
    """One name, identifier or path: the limit of a path on Linux."""
    max_loss_fn_inputs: int = 64
    """Per-token inputs of one datum."""
    max_loss_fn_config_keys: int = 64
    """Settings of a loss in one operation."""
    max_forward_seq_ids: int = 4096
    """Graphs that one cancel drops."""
    max_typed_datums: int = 4096
    """Sequences in one operation in the form for typing by hand (`data`); each takes time to check."""
    max_typed_values: int = 4_194_304
    """Elements of one tensor in the form for typing by hand (`floats`, `ints`)."""
    max_tensor_dims: int = 64
    """Dims of one tensor: as many as numpy allows."""
    max_prompt_text_bytes: int = 262_144
    """One prompt as text: some 60,000 tokens, which take the tokenizer a fraction of a second."""
    max_stop_token_ids: int = 1024
    """Stop tokens of one request."""
    max_stop_strings: int = 128
    """Stop strings of one request."""
    max_stop_string_bytes: int = 1024
    """Size of one stop string."""
    max_stop_bytes: int = 4096
    """Size of all stop strings together: matching takes a hundred times as much memory, for every request under way."""
    max_metrics: int = 256
    """Metrics of one backward, and names in one GetMetrics."""


Sync = Literal["normal", "full"]
"""When a commit to a journal reaches the disk itself: "full" at once, "normal" a moment later. A killed process loses
nothing either way; with "normal", a power cut or a kernel crash may lose a run's last moments."""


@dataclass(frozen=True)
class Retention:
    """What a journal keeps beyond what recovery needs, which is always kept. 0: no limit of this kind."""

    keep_operations: int = option(0, help="latest operations that a journal keeps; 0: no limit", at_least=0)
    keep_s: float = option(0.0, help="age up to which a journal keeps operations; 0: no limit", at_least=0)
    keep_bytes: int = option(4 * 1024**3, help="size of a journal; 0: no limit", at_least=0)
    keep_everything: bool = option(
        False,
        help="delete nothing, first snapshots included: a run can be forked at any step and replayed from its "
        "beginning, and its folder grows without bound",
    )


@dataclass(frozen=True)
class SnapshotPolicy:
    """When snapshots are taken: after an optim_step, as soon as either is reached."""

    every_steps: int = option(
        0, name="snapshot-steps", help="optimizer steps between snapshots; 0: only time counts", at_least=0
    )
    interval_s: float = option(
        300.0, name="snapshot-interval-s", help="time between snapshots; 0: only steps count", at_least=0
    )


@dataclass(frozen=True)
class Durability:
    """How runs are kept."""

    sync: Sync = option("normal", name="journal-sync", help="full: journals also survive power loss, but are slower")
    retention: Retention = options_of(Retention)
    snapshots: SnapshotPolicy = options_of(SnapshotPolicy)
    idle_lease_s: float = option(
        900.0,
        help="time since its last call after which a run without a client may be unloaded to disk; 0: never",
        at_least=0,
    )


@dataclass(frozen=True)
class ServerTls:
    """PEM files of a server that speaks TLS."""

    cert_file: Path = option(
        name="tls-cert-file",
        help="PEM; certificate of the server, followed by intermediate ones; with --tls-key-file: serve TLS",
    )
    key_file: Path = option(name="tls-key-file", help="PEM; private key of the certificate")
    client_ca_file: Path | None = option(
        None, name="tls-client-ca-file", help="PEM; accept only clients with a certificate from this root (mutual TLS)"
    )


@dataclass(frozen=True)
class NodeTls:
    """PEM files of a machine that joins a trainer with a certificate."""

    ca_file: Path | None = option(
        None,
        name="tls-ca-file",
        help="PEM; roots the trainer's certificate must come from",
        default_is="the system's",
    )
    cert_file: Path | None = option(
        None, name="tls-cert-file", help="PEM; certificate for a trainer that asks for one (--tls-client-ca-file)"
    )
    key_file: Path | None = option(None, name="tls-key-file", help="PEM; private key of the certificate")


@dataclass(frozen=True)
class NodeSettings:
    """The machines (nodes) of a worker; the trainer is on the first."""

    nnodes: int = option(
        1, help="machines; on each other one, run `gradwire worker --join`", at_least=1, metavar="NODES"
    )
    rdzv_endpoint: str = option(
        "",
        help="address of this machine where the others join; port and address must be open to them and to nobody else, "
        "see docs/ranks.md",
        metavar="HOST:PORT",
    )
    join_token_file: Path | None = option(
        None, help="file with the secret that nodes show when they join", default_is="$GRADWIRE_JOIN_TOKEN"
    )


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """What a process logs, on stderr."""

    log_json: bool = option(False, help="log one JSON object per line")
    log_level: str = option(
        "INFO",
        help="lowest level that is logged",
        default_is="$GRADWIRE_LOG_LEVEL or INFO",
        env="GRADWIRE_LOG_LEVEL",
    )


def _listen(default: str) -> str:
    return option(default, help="address to listen on; port 0 takes a free one", metavar="HOST:PORT")


@dataclass(frozen=True, kw_only=True)
class ServerConfig(LogSettings):
    """Settings that every server has."""

    listen: str
    data_dir: Path = option(
        lambda: Path.home() / ".gradwire",
        help="folder for all data",
        default_is="$GRADWIRE_HOME or ~/.gradwire",
        env="GRADWIRE_HOME",
        parse=folder,
    )
    api_keys: tuple[str, ...] = ()
    """Entries of the keys it accepts, see access.ApiKeys; without any, it serves everyone who can reach it."""
    api_key_file: Path | None = option(
        None,
        help="API keys, one per line: `key`, `name key` or `name key admin`; read again when it changes; see "
        "docs/security.md",
    )
    allow_no_api_key: bool = option(False, help="listen beyond loopback without an API key")
    tls: ServerTls | None = options_of(ServerTls, "TLS", leave_out=("client_ca_file",), optional=True)
    ready_file: Path | None = option(None, help="gets the address as JSON once the server listens")
    exit_with_parent: bool = option(False, help="stop at the end of stdin")


@dataclass(frozen=True, kw_only=True)
class GrpcServerConfig(ServerConfig):
    """Settings that a trainer and the control plane, which starts trainers, share."""

    storage_url: str = option(
        "",
        help="object store or file system that also keeps checkpoints, such as s3://bucket/prefix",
        default_is="$GRADWIRE_STORAGE_URL, or --data-dir alone",
        env="GRADWIRE_STORAGE_URL",
        metavar="URL",
    )
    health_listen: str | None = option(
        None, help="also serve health here, in plaintext and to everyone, for a cluster's probes", metavar="HOST:PORT"
    )


@dataclass(frozen=True, kw_only=True)
class TrainerConfig(GrpcServerConfig, ModelSettings):
    """Settings of a trainer."""

    tls: ServerTls | None = options_of(ServerTls, "TLS", optional=True)
    aliases: tuple[str, ...] = option(
        (), name="alias", help="another name that callers may give the model; repeatable", metavar="NAME"
    )
    listen: str = _listen("127.0.0.1:7777")
    gateway_listen: str | None = option(
        None,
        name="gateway",
        help="also serve clients of hosted services here, like `gradwire gateway`",
        metavar="HOST:PORT",
    )
    page_listen: str | None = option(
        None, name="page", help="serve the live page here, such as 127.0.0.1:8080", metavar="HOST:PORT"
    )
    metrics_port: int | None = option(
        None, help="serve Prometheus metrics here; 0 takes a free port", metavar="PORT", at_least=0
    )
    metrics_host: str = option("127.0.0.1", help="address of the metrics", metavar="HOST")
    otlp_endpoint: str | None = option(
        None,
        help="send traces of operations to a collector here, such as http://127.0.0.1:4317; without it to that of "
        "OpenTelemetry's variables, if there is one",
        metavar="URL",
    )
    reflection: bool = option(True, help="do not describe the services to grpcurl")
    runs_dir: Path | None = option(
        None, help="journals and snapshots, one folder per run", default_is="runs in --data-dir", parse=folder
    )
    adapter_dir: Path | None = option(
        None, help="PEFT adapters that LoRA runs may start from", default_is="adapters in --data-dir"
    )
    drain_timeout_s: float = option(30.0, help="time for queued operations after SIGTERM", at_least=0)
    detach_grace_s: float = option(
        180.0, help="time to keep the graphs of custom losses once their client is gone", at_least=0
    )
    worker_timeouts: WorkerTimeouts = options_of(WorkerTimeouts)
    nodes: NodeSettings = options_of(NodeSettings, "several machines")
    durability: Durability = options_of(Durability, "durability")
    limits: Limits = options_of(Limits, "limits")

    @property
    def metrics_listen(self) -> str | None:
        """host:port of the metrics; None serves none."""
        return None if self.metrics_port is None else join_address(self.metrics_host, self.metrics_port)

    @property
    def checkpoint_dir(self) -> Path:
        """Folder of checkpoints, which trainer and worker share."""
        return self.data_dir / "checkpoints"


def _rank_of_pod() -> int:
    """The rank of a pod of an indexed Job, whose pods are numbered from 0."""
    index = os.environ.get("JOB_COMPLETION_INDEX", "")
    if not index.isdecimal():
        raise SettingsError("--node-rank must be given, from 1; 0 is the trainer's machine.")
    return int(index) + 1


@dataclass(frozen=True, kw_only=True)
class NodeConfig(LogSettings):
    """Settings of a machine that takes part in a worker whose trainer is on another."""

    join: str = option(
        help="--rdzv-endpoint of the trainer; https://HOST:PORT if it has a certificate", metavar="HOST:PORT"
    )
    node_rank: int = option(
        _rank_of_pod,
        help="place of this machine, from 1; 0 is the trainer's",
        at_least=0,
        default_is="in an indexed Job of Kubernetes, $JOB_COMPLETION_INDEX + 1",
        metavar="RANK",
    )
    base_model: str = option(
        "", help="where the model is on this machine", default_is="where the trainer has it", metavar="MODEL"
    )
    join_token_file: Path | None = option(
        None, help="file with the secret that the trainer wants to see", default_is="$GRADWIRE_JOIN_TOKEN"
    )
    tls: NodeTls | None = options_of(NodeTls, "TLS", optional=True)
    health_listen: str | None = option(
        None, help="serve health here, in plaintext and to everyone, for a cluster's probes", metavar="HOST:PORT"
    )
    stop_exit_code: int = option(
        0,
        help="exit code when told to stop; a Job of Kubernetes takes 0 for done, and starts no other pod in its stead",
        at_least=0,
        metavar="CODE",
    )
    exit_with_parent: bool = option(False, help="stop at the end of stdin")


@dataclass(frozen=True)
class KubernetesSettings:
    """Where in a cluster trainer jobs run, and their template."""

    template: Path = option(
        name="kubernetes-template",
        help="YAML of the StatefulSet and Service that jobs are made from, as rendered by the Helm chart",
    )
    namespace: str = option(
        "",
        name="kubernetes-namespace",
        help="namespace of the jobs",
        default_is="the pod's own, or the kubeconfig's",
        metavar="NAME",
    )
    name: str = option(
        "gradwire",
        name="kubernetes-name",
        help="name of this control plane: a label by which it finds its jobs again",
        metavar="NAME",
    )
    address: str = option(
        "{name}.{namespace}.svc:{port}",
        name="kubernetes-address",
        help="where clients reach a job's trainer, with its Service's {name}, {namespace}, {port} and {node_port}",
        metavar="HOST:PORT",
    )
    accelerator_label: str = option(
        "nvidia.com/gpu.product",
        name="kubernetes-accelerator-label",
        help="node label whose value is a job's accelerator_type",
        metavar="LABEL",
    )
    accelerator_resource: str = option(
        "nvidia.com/gpu",
        name="kubernetes-accelerator-resource",
        help="resource that a job's accelerator_count counts",
        metavar="RESOURCE",
    )
    pending_timeout_s: float = option(
        900.0, help="how long a pod may wait for a node, a volume or an image before its job fails", at_least=0
    )


@dataclass(frozen=True, kw_only=True)
class JobsConfig(GrpcServerConfig):
    """Settings of the control plane."""

    listen: str = _listen("127.0.0.1:7070")
    model_dir: Path | None = option(
        None,
        help="models that callers name by their path below it; callers who are not admins can name these and hub ids "
        "alone",
        default_is="models in --data-dir",
        parse=folder,
    )
    max_jobs: int = option(8, help="simultaneous trainer jobs, including failed ones that were not deleted", at_least=1)
    max_jobs_per_key: int = option(0, help="of those, jobs of one API key; 0: only --max-jobs counts", at_least=0)
    embedded: bool = option(
        False,
        help="serve only the program that started it: every caller sees what an admin sees and may name any "
        "folder, and jobs end with it",
    )
    make_certificates: bool = option(
        False,
        help="make a certificate for each job's trainer, and give it to the owner, instead of using --tls-cert-file",
    )
    kubernetes: KubernetesSettings | None = options_of(
        KubernetesSettings, "in a cluster (--backend kubernetes)", optional=True
    )
    """Trainers run in this cluster; None: on this machine."""


@dataclass(frozen=True, kw_only=True)
class GatewayConfig(ServerConfig):
    """Settings of a gateway."""

    listen: str = _listen("127.0.0.1:8000")
    trainers: tuple[str, ...] = option(
        ("http://127.0.0.1:7777",),
        name="trainer",
        help="trainer behind the gateway; repeatable",
        default_is="http://127.0.0.1:7777",
        metavar="URL",
    )
    trainer_ca_file: Path | None = option(None, help="PEM; root certificates of https:// trainers")
    served_model_names: tuple[str, ...] = option(
        (),
        name="served-model-name",
        also=("--alias",),
        help="another name for a model, listed before its own; repeatable",
        metavar="NAME[=MODEL]",
    )
    session_grace_s: float = option(
        120.0, help="a client silent for this long is considered gone, and its runs are deleted", at_least=0
    )
    max_in_flight_samples: int = 512
    """Simultaneous Sample calls; the trainer's own limit is for all its clients together."""
    max_num_samples: int = 128
    """Samples of one call."""
