"""Settings of the processes. Ground floor: imports nothing of ours but the SDK's wire half."""

import argparse
import importlib.util
import ipaddress
import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from trainer_service import user_metadata

MIN_PROTOCOL_VERSION = 1
"""Oldest protocol version this trainer speaks; the newest is gradwire._wire.version.PROTOCOL_VERSION."""


MAX_RUNS_VARIABLE = "GRADWIRE_MAX_RUNS"
"""How the worker learns the trainer's --max-runs."""

RANK_STORE_VARIABLE = "GRADWIRE_RANK_STORE"
"""How the worker's ranks learn the path of the file where they meet."""

HEARTBEAT_INTERVAL_S = 1.0
"""How often a worker that is ready says that it runs."""


class SettingsError(ValueError):
    """A setting that cannot be; the message is for the person who set it."""


@dataclass(frozen=True)
class Limits:
    """The most a client may send; announced by GetServerInfo."""

    max_message_bytes: int = 64 * 1024 * 1024
    """One message, either way."""
    target_message_bytes: int = 1024 * 1024
    """Size the SDK splits batches at: larger protobuf messages move slower through gRPC, smaller ones cost overhead."""
    max_in_flight_operations: int = 64
    """Operations of one run sent and not yet answered; the trainer reads no further beyond it."""
    max_runs: int = field(default_factory=lambda: int(os.environ.get(MAX_RUNS_VARIABLE) or 8))
    """Runs held at once; each full-parameter run has parameters, gradients and optimizer state of its own. How many fit
    depends on the model and the device, so it is a setting."""
    max_runs_per_key: int = 0
    """Of those, runs of one API key; 0 for no limit of its own."""
    max_disk_bytes: int = 0
    """Bytes under the data folder from which on nothing more is saved; 0 for no limit."""
    max_datums: int = 65_536
    """Sequences in one operation."""
    max_tokens: int = 4_194_304
    """Tokens in one operation."""
    max_num_samples: int = 128
    """Samples of one Sample request."""
    max_topk_logprobs: int = 128
    """Likeliest tokens asked for at one place."""
    max_sample_requests: int = 1024
    """Sample and ComputeLogprobs requests under way at once, of all clients together; where one owner's take them all,
    another has half a share on top."""
    max_frozen_weights: int = 4
    """Sets of frozen weights of one run; the one unused longest makes room, of those that nobody holds open."""
    max_user_metadata_entries: int = user_metadata.MAX_ENTRIES
    """Of one user_metadata."""
    max_user_metadata_bytes: int = user_metadata.MAX_BYTES
    """Its keys and values together."""
    max_message_fields: int = 65_536
    """Fields of one message, nested ones included; counted before it is parsed, which takes the longer the more there
    are. Data sent as `batch` have a dozen."""
    max_name_bytes: int = 4096
    """One name, identifier or path: as much as a path of Linux has."""
    max_loss_fn_inputs: int = 64
    """Per-token inputs of one datum."""
    max_loss_fn_config_keys: int = 64
    """Settings of a loss in one operation."""
    max_forward_seq_ids: int = 4096
    """Graphs dropped by one cancel."""
    max_typed_datums: int = 4096
    """Sequences in one operation in the form a person types (`data`); each costs time of its own to look at."""
    max_typed_values: int = 4_194_304
    """Elements of one tensor in the form a person types (`floats`, `ints`)."""
    max_tensor_dims: int = 64
    """Dims of one tensor: as many as numpy has."""
    max_prompt_text_bytes: int = 262_144
    """One prompt as text: some 60,000 tokens, a fraction of a second of the tokenizer's time."""
    max_stop_token_ids: int = 1024
    """Stop tokens of one request."""
    max_stop_strings: int = 128
    """Stop strings of one request."""
    max_stop_string_bytes: int = 1024
    """One of them."""
    max_stop_bytes: int = 4096
    """All of them together: what finds them takes a hundred times as much memory, for every request under way."""
    max_metrics: int = 256
    """Metrics of one backward, and names asked for at once."""


Checkpointing = Literal["auto", "on", "off"]
ComputeDtype = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class EngineSettings:
    """What a trainer's owner decides about memory and precision. The trainer hands them to its worker as it was given
    them."""

    compute_dtype: ComputeDtype = "auto"
    """Of matrix products; "auto" is float32 on the CPU and bfloat16 on CUDA. Parameters, gradients and optimizer state
    are float32 always."""
    max_pack_tokens: int = 0
    """Most tokens of one forward; 0 decides from memory. A longer sequence is a forward of its own."""
    max_held_graph_bytes: int = 0
    """Most that graphs of custom losses may hold; beyond it the oldest are dropped and computed again at their
    backward. 0 decides from memory."""
    max_device_adapter_bytes: int = 0
    """Most that adapters of LoRA runs may hold on the device, gradients and optimizer state included; beyond it those
    unused longest wait in the host's memory. 0 decides from memory; on the CPU, where it is the same, all stay."""
    activation_checkpointing: Checkpointing = "auto"
    """Whether backward computes activations again instead of having them held; "auto" does so for forwards that would
    not fit otherwise."""

    @staticmethod
    def add_arguments(parser: "argparse._ActionsContainer") -> None:
        """Takes them on a command line."""
        parser.add_argument(
            "--compute-dtype",
            choices=("auto", "float32", "bfloat16"),
            default="auto",
            help="of matrix products; auto: float32 on the CPU, bfloat16 on CUDA",
        )
        parser.add_argument("--max-pack-tokens", type=int, default=0, help="of one forward; 0 decides from memory")
        parser.add_argument(
            "--max-held-graph-bytes", type=int, default=0, help="held for custom losses; 0 decides from memory"
        )
        parser.add_argument(
            "--max-device-adapter-bytes",
            type=int,
            default=0,
            help="beyond it idle adapters wait in host memory; 0 decides from memory",
        )
        parser.add_argument(
            "--activation-checkpointing",
            choices=("auto", "on", "off"),
            default="auto",
            help="less memory, more time; auto: where a forward would not fit otherwise",
        )

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> "EngineSettings":
        """As the command line says.

        Raises:
            SettingsError: A number below 0.
        """
        settings = cls(**{item.name: getattr(arguments, item.name) for item in fields(cls)})
        for name in ("max_pack_tokens", "max_held_graph_bytes", "max_device_adapter_bytes"):
            if getattr(settings, name) < 0:
                option = f"--{name.replace('_', '-')}"
                raise SettingsError(f"{option} is {getattr(settings, name)}; it must be at least 0.")
        return settings

    def command_line(self) -> list[str]:
        """The same for another process."""
        return [
            part
            for item in fields(self)
            for part in (f"--{item.name.replace('_', '-')}", str(getattr(self, item.name)))
        ]


Sync = Literal["normal", "full"]
"""When what a journal has committed is on the platter: "full" at every commit, "normal" a moment later. Killing
processes loses nothing either way; losing power or the kernel may, with "normal", take the last moments of a run."""


@dataclass(frozen=True)
class Retention:
    """What of a journal is kept beyond what recovery needs, which is always kept. 0: no limit of this kind."""

    keep_operations: int = 0
    """The latest operations."""
    keep_s: float = 0.0
    """Those received within so many seconds."""
    keep_bytes: int = 4 * 1024**3
    """The latest, up to so many bytes."""
    keep_everything: bool = False
    """Nothing is let go, first snapshots included: a run can be forked at any step and replayed from its beginning."""


@dataclass(frozen=True)
class SnapshotPolicy:
    """When snapshots are taken: after an optim_step, once either is reached. 0 switches one off."""

    every_steps: int = 0
    """Optimizer steps since the last."""
    interval_s: float = 300.0
    """Seconds since the last."""


@dataclass(frozen=True)
class Durability:
    """How runs are kept."""

    sync: Sync = "normal"
    retention: Retention = field(default_factory=Retention)
    snapshots: SnapshotPolicy = field(default_factory=SnapshotPolicy)
    idle_lease_s: float = 900.0
    """Seconds after its last call from which on a run without a client makes room on the worker; 0: never."""


PAGE_CONNECTIONS = 512
"""To the live page at once; one too many is answered 503. A page keeps one open, and asks over a second."""


@dataclass(frozen=True)
class ServerTls:
    """PEM files of a server that speaks TLS."""

    cert_file: Path
    """Its certificate, and those between it and its root."""
    key_file: Path
    """The certificate's private key."""
    client_ca_file: Path | None = None
    """Roots that clients' certificates must come from (mutual TLS); None asks clients for none."""


@dataclass(frozen=True)
class TrainerConfig:
    """Settings of a trainer."""

    base_model: str
    """Hub id or folder."""
    served_model_name: str = ""
    """What callers are told it is called; "" tells them base_model."""
    aliases: tuple[str, ...] = ()
    """Further names that callers may give it."""
    listen: str = "127.0.0.1:7777"
    """host:port; port 0 takes a free one."""
    metrics_listen: str | None = None
    """host:port of the Prometheus endpoint; None serves none."""
    page_listen: str | None = None
    """host:port of the live page; None serves none."""
    data_dir: Path = field(default_factory=lambda: default_data_dir())
    """Where checkpoints go, to begin with."""
    storage_url: str = ""
    """Object store, or another file system, that checkpoints are kept in beyond this machine; "" keeps them in
    data_dir alone."""
    runs_dir: Path | None = None
    """Where runs are kept, a folder each; None: `runs` in data_dir."""
    durability: Durability = field(default_factory=Durability)
    """How they are."""
    max_context_length: int = 0
    """Longest sequence taken, tokens; 0 takes the model's own limit."""
    adapter_dir: Path | None = None
    """Where adapters may lie that LoRA runs start from; None takes "adapters" in data_dir."""
    loss_module: str = ""
    """Python module whose LOSSES the worker takes beside the built-in ones; "" for none."""
    api_keys: tuple[str, ...] = ()
    """Entries of keys that open the trainer, see access.ApiKeys; none at all opens it to everybody who can reach it."""
    api_key_file: Path | None = None
    """More of them, one a line; read again when it changes."""
    tls: "ServerTls | None" = None
    """How it proves who it is; None listens in plaintext."""
    health_listen: str | None = None
    """host:port that serves health alone, in plaintext and to everybody, for a cluster's probes; None opens none."""
    allow_no_api_key: bool = False
    """Listen beyond loopback without a key."""
    reflection: bool = True
    ready_file: Path | None = None
    """Gets {"address", "metrics_address", "page_url", "pid"} as JSON once the trainer listens."""
    drain_timeout_s: float = 30.0
    """How long queued operations may take to finish after SIGTERM."""
    detach_grace_s: float = 180.0
    """How long a run whose client is gone keeps the graphs of its custom losses."""
    exit_with_parent: bool = False
    """Stop when stdin reaches its end."""
    limits: Limits = field(default_factory=Limits)
    engine: EngineSettings = field(default_factory=EngineSettings)

    @property
    def checkpoint_dir(self) -> Path:
        """Folder that trainer and worker share."""
        return self.data_dir / "checkpoints"


@dataclass(frozen=True)
class KubernetesSettings:
    """Where in a cluster trainer jobs run, and from what they are made."""

    template: Path
    """YAML of a StatefulSet and a Service, as the Helm chart renders them; jobs are made from it."""
    namespace: str = ""
    """"": the control plane's own, or where it runs outside the cluster, that of the kubeconfig's context."""
    name: str = "gradwire"
    """Of this control plane: a label of its jobs, by which it finds them again."""
    address: str = "{name}.{namespace}.svc:{port}"
    """host:port at which clients reach a job's trainer; {name} and {node_port} are of its Service."""
    accelerator_label: str = "nvidia.com/gpu.product"
    """Node label whose value a job's accelerator_type is."""
    accelerator_resource: str = "nvidia.com/gpu"
    """What a job's accelerator_count counts."""
    pending_timeout_s: float = 900.0
    """How long a pod may find no node, no volume or no image before its job has failed."""


@dataclass(frozen=True)
class JobsConfig:
    """Settings of the control plane."""

    listen: str = "127.0.0.1:7070"
    """host:port; port 0 takes a free one."""
    data_dir: Path = field(default_factory=lambda: default_data_dir())
    """Where trainers' logs and checkpoints go."""
    model_dir: Path | None = None
    """Where base_model is looked for when it is a relative path; callers that are not admins may name no other folder.
    None: for them, models in data_dir; for admins, where the control plane runs."""
    max_jobs: int = 8
    """Trainer jobs at once, failed ones that nobody deleted included."""
    max_jobs_per_key: int = 0
    """Of those, jobs of one API key; 0 for no limit of its own."""
    embedded: bool = False
    """Of one program, which started it for itself and runs as the same user: every caller is told of the host what an
    admin is told and may name any folder, and jobs end with the control plane."""
    storage_url: str = ""
    """Of the trainers, see TrainerConfig."""
    api_keys: tuple[str, ...] = ()
    """Entries of keys that open the control plane and the trainers it starts, see access.ApiKeys."""
    api_key_file: Path | None = None
    """More of them, one a line; read again when it changes, by the trainers too."""
    tls: ServerTls | None = None
    """How it proves who it is, and trainers on this machine too; None listens in plaintext."""
    make_certificates: bool = False
    """Make each job's trainer a certificate of its own, which its owner is handed."""
    health_listen: str | None = None
    """As in TrainerConfig."""
    kubernetes: KubernetesSettings | None = None
    """Trainers run in this cluster; None: on this machine."""
    allow_no_api_key: bool = False
    """Listen beyond loopback without a key."""
    ready_file: Path | None = None
    """Gets {"address", "pid"} as JSON once the control plane listens."""
    exit_with_parent: bool = False
    """Stop, with all trainers, when stdin reaches its end."""


def default_data_dir() -> Path:
    """$GRADWIRE_HOME, or ~/.gradwire."""
    return Path(os.environ.get("GRADWIRE_HOME") or Path.home() / ".gradwire")


def read_umask() -> int:
    """GRADWIRE_UMASK, octal: what files and folders that are made are never allowed to be. By default nobody but their
    owner reads them, for they hold what a model was trained on.

    Raises:
        SettingsError: It is no octal number from 0 to 777.
    """
    given = os.environ.get("GRADWIRE_UMASK") or "077"
    if not re.fullmatch("0*[0-7]{1,3}", given):
        raise SettingsError(f"GRADWIRE_UMASK is {given!r}; it must be an octal number such as 077 or 027.")
    return int(given, 8)


def read_api_keys() -> tuple[str, ...]:
    """Entries of GRADWIRE_API_KEY, which are separated by commas."""
    entries = os.environ.get("GRADWIRE_API_KEY", "").split(",")
    return tuple(dict.fromkeys(entry.strip() for entry in entries if entry.strip()))


def server_tls(*, cert_file: Path | None, key_file: Path | None, client_ca_file: Path | None) -> ServerTls | None:
    """The TLS files given; None if none was.

    Raises:
        SettingsError: One of the pair is missing, or a file is not PEM.
        OSError: A file cannot be read.
    """
    if cert_file is None and key_file is None and client_ca_file is None:
        return None
    if cert_file is None or key_file is None:
        raise SettingsError("TLS needs both --tls-cert-file and --tls-key-file.")
    for option, file in (("cert", cert_file), ("key", key_file), ("client-ca", client_ca_file)):
        if file is not None and b"-----BEGIN " not in file.read_bytes():
            raise SettingsError(f"--tls-{option}-file {file} is not a PEM file.")
    return ServerTls(cert_file=cert_file, key_file=key_file, client_ca_file=client_ca_file)


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of "host:port" or "[v6]:port".

    Raises:
        SettingsError: No host or no port in it.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not host or not port.isdigit() or int(port) > 65535:
        raise SettingsError(f'address {address!r} must be "host:port", for example "127.0.0.1:7777".')
    return host, int(port)


def listens_on_loopback(listen: str) -> bool:
    """Whether only this machine can reach an address.

    Raises:
        SettingsError: It is no address.
    """
    host, _ = split_address(listen)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_exposure(listen: str, *, guarded: bool, allow_no_api_key: bool) -> None:
    """Refuses to listen beyond this machine to whoever calls.

    Args:
        listen: host:port.
        guarded: Whether a key, or a client certificate, is asked for.
        allow_no_api_key: Listen all the same.

    Raises:
        SettingsError: Names the ways out.
    """
    if not listens_on_loopback(listen) and not guarded and not allow_no_api_key:
        raise SettingsError(
            f"--listen {listen} is reachable from other machines, and there is no API key. Set GRADWIRE_API_KEY or "
            "--api-key-file, or pass --allow-no-api-key if something in front of Gradwire checks who calls."
        )


def check_page(listen: str, *, guarded: bool) -> None:
    """Refuses to show a page beyond this machine to whoever looks, or without the packages it takes.

    Args:
        listen: host:port.
        guarded: Whether a key, or a client certificate, is asked for.

    Raises:
        SettingsError: Names the way out.
    """
    if not listens_on_loopback(listen) and not guarded:
        raise SettingsError(
            f"--page {listen} is reachable from other machines, and there is no API key. Set GRADWIRE_API_KEY or "
            "--api-key-file, or listen on 127.0.0.1 and forward the port (ssh -L)."
        )
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise SettingsError(
            f"--page needs {' and '.join(missing)}, which cannot be imported. Install it with "
            "`pip install 'gradwire[page]'`."
        )


def check_base_model(base_model: str) -> None:
    """Refuses what is spelt as a folder and is none, seconds before a worker could.

    Raises:
        SettingsError: Says so.
    """
    if base_model.startswith(("/", "./", "../", "~")) and not os.path.isdir(base_model):
        raise SettingsError(
            f"--base-model {base_model} does not exist or is no folder; give a Hugging Face model folder or a hub id."
        )


def check_ranks(nproc_per_node: int, *, collective_timeout_s: float) -> None:
    """Refuses ranks that cannot be.

    Raises:
        SettingsError: Says so.
    """
    if nproc_per_node < 1:
        raise SettingsError(f"--nproc-per-node is {nproc_per_node}; it must be at least 1, the ranks on this machine.")
    if not collective_timeout_s > 0:
        raise SettingsError(f"--collective-timeout-s is {collective_timeout_s:g}; it must be above 0.")
