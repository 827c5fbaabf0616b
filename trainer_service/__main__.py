"""`gradwire serve`, `gradwire jobs` and `gradwire gateway`: reads settings, builds the floors, wires them."""

import argparse
import asyncio
import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from trainer_service import config, descriptors
from trainer_service.access import ApiKeys
from trainer_service.observability import configure_logging

if TYPE_CHECKING:
    from trainer_service.fleet.worker import Worker
    from trainer_service.page.server import PageServer
    from trainer_service.trainer import TrainerServer


def main() -> int:
    """Exit code: 0 after a clean stop, 1 if it could not run, 2 for settings that cannot be."""
    args = _parser().parse_args()
    configure_logging(as_json=args.log_json, level=args.log_level)
    descriptors.raise_limit()
    try:
        # Before anything is written. Processes that are started inherit it.
        os.umask(config.read_umask())
        keys = ApiKeys(config.read_api_keys(), args.api_key_file)
        # A client certificate that is asked for guards as a key does.
        guarded = keys.required or getattr(args, "tls_client_ca_file", None) is not None
        config.check_exposure(args.listen, guarded=guarded, allow_no_api_key=args.allow_no_api_key)
        if getattr(args, "page", None) is not None:
            config.check_page(args.page, guarded=guarded)
        return asyncio.run(args.command(args))
    except (config.SettingsError, OSError) as exc:
        print(f"gradwire: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


async def _trainer(args: argparse.Namespace) -> int:
    from trainer_service.fleet.supervisor import WorkerSettings, WorkerSupervisor
    from trainer_service.processes import parent_gone, wait_for_signal, write_ready_file
    from trainer_service.trainer import TrainerServer

    config.check_base_model(args.base_model)
    config.check_ranks(args.nproc_per_node, collective_timeout_s=args.collective_timeout_s)
    _check_storage_url(args.storage_url)
    if args.gateway is not None:
        guarded = bool(config.read_api_keys()) or args.api_key_file is not None
        config.check_exposure(args.gateway, guarded=guarded, allow_no_api_key=args.allow_no_api_key)
        if args.tls_cert_file is not None:
            raise config.SettingsError(
                "--gateway is for a trainer without TLS; with it, run `gradwire gateway --trainer https://HOST:PORT`."
            )
    settings = config.TrainerConfig(
        base_model=args.base_model,
        served_model_name=args.served_model_name,
        aliases=tuple(args.alias),
        listen=args.listen,
        metrics_listen=None if args.metrics_port is None else f"{args.metrics_host}:{args.metrics_port}",
        page_listen=args.page,
        data_dir=args.data_dir.resolve(),
        storage_url=args.storage_url,
        max_context_length=args.max_context_length,
        adapter_dir=args.adapter_dir,
        loss_module=args.loss_module,
        api_keys=config.read_api_keys(),
        api_key_file=args.api_key_file,
        allow_no_api_key=args.allow_no_api_key,
        health_listen=_health_listen(args),
        reflection=not args.no_reflection,
        ready_file=args.ready_file,
        drain_timeout_s=args.drain_timeout_s,
        detach_grace_s=args.detach_grace_s,
        exit_with_parent=args.exit_with_parent,
        tls=config.server_tls(
            cert_file=args.tls_cert_file, key_file=args.tls_key_file, client_ca_file=args.tls_client_ca_file
        ),
        runs_dir=None if args.runs_dir is None else args.runs_dir.resolve(),
        durability=_durability(args),
        limits=config.Limits(
            max_runs=args.max_runs, max_runs_per_key=args.max_runs_per_key, max_disk_bytes=args.max_disk_bytes
        ),
        engine=config.EngineSettings.from_arguments(args),
    )
    worker = WorkerSupervisor(
        WorkerSettings(
            base_model=settings.base_model,
            served_model_name=settings.served_model_name,
            checkpoint_dir=settings.checkpoint_dir,
            max_context_length=settings.max_context_length,
            max_message_bytes=settings.limits.max_message_bytes,
            max_runs=settings.limits.max_runs,
            loss_module=settings.loss_module,
            engine=settings.engine,
            start_timeout_s=args.worker_start_timeout_s,
            heartbeat_timeout_s=args.worker_heartbeat_timeout_s,
            local_world_size=args.nproc_per_node,
            collective_timeout_s=args.collective_timeout_s,
        )
    )
    server = TrainerServer(settings, worker)
    # Before anything is started, so that a signal in between is not lost.
    ends = [asyncio.create_task(wait_for_signal())]
    if settings.exit_with_parent:
        ends.append(asyncio.create_task(parent_gone()))
    stop_metrics, metrics_address, page = None, "", None
    beside = contextlib.AsyncExitStack()
    try:
        if settings.metrics_listen is not None:
            metrics_address, stop_metrics = server.metrics.serve(settings.metrics_listen)
        await server.start()
        if settings.page_listen is not None:
            page = _page(server, worker, settings.page_listen)
            await page.start()
        await worker.start()
        if args.gateway is not None:
            await beside.enter_async_context(_gateway_beside(args, server.address))
        if settings.ready_file is not None:
            addresses = {"address": server.address, "metrics_address": metrics_address}
            write_ready_file(settings.ready_file, **addresses, page_url="" if page is None else page.url)
        await asyncio.wait([*ends, worker.gave_up], return_when=asyncio.FIRST_COMPLETED)
    finally:
        await beside.aclose()
        await server.drain()
        if page is not None:
            await page.stop()
        if stop_metrics is not None:
            stop_metrics()
        for task in ends:
            task.cancel()
    if worker.gave_up.done():
        print(f"gradwire: {worker.gave_up.result()}", file=sys.stderr)
        return 1
    return 0


def _gateway_beside(args: argparse.Namespace, address: str) -> contextlib.AbstractAsyncContextManager[None]:
    """The gateway that --gateway asks for."""
    from trainer_service.gateway_child import gateway_child

    options = ["--log-level", args.log_level] + (["--log-json"] if args.log_json else [])
    options += ["--allow-no-api-key"] if args.allow_no_api_key else []
    options += ["--api-key-file", str(args.api_key_file)] if args.api_key_file is not None else []
    return gateway_child(args.gateway, trainer=address, data_dir=args.data_dir.resolve(), options=options)


def _page(server: "TrainerServer", worker: "Worker", listen: str) -> "PageServer":
    # Imported only where there is a page: its packages are an extra.
    from trainer_service.page.server import PageServer

    return PageServer(
        listen,
        api_keys=server.api_keys,
        tls=server.config.tls,
        limits=server.config.limits,
        runs=server.runs,
        metrics=server.run_metrics,
        sampling=server.sampling,
        catalog=server.catalog,
        worker=worker,
    )


def _check_storage_url(url: str) -> None:
    """Refuses a URL of no known scheme, or one whose package is not installed."""
    from trainer_service.checkpoints.storage import Storage

    try:
        if url:
            Storage(url)
    except ValueError as exc:
        raise config.SettingsError(f"--storage-url: {exc}") from exc


def _durability(args: argparse.Namespace) -> config.Durability:
    return config.Durability(
        sync=args.journal_sync,
        retention=config.Retention(
            keep_operations=args.keep_operations,
            keep_s=args.keep_s,
            keep_bytes=args.keep_bytes,
            keep_everything=args.keep_everything,
        ),
        snapshots=config.SnapshotPolicy(every_steps=args.snapshot_steps, interval_s=args.snapshot_interval_s),
        idle_lease_s=args.idle_lease_s,
    )


async def _jobs(args: argparse.Namespace) -> int:
    from trainer_service.control_plane import serve_jobs

    # Told now, rather than by the first trainer.
    _check_storage_url(args.storage_url)
    settings = config.JobsConfig(
        listen=args.listen,
        data_dir=args.data_dir.resolve(),
        model_dir=None if args.model_dir is None else args.model_dir.resolve(),
        max_jobs=args.max_jobs,
        max_jobs_per_key=args.max_jobs_per_key,
        embedded=args.embedded,
        storage_url=args.storage_url,
        api_keys=config.read_api_keys(),
        api_key_file=args.api_key_file,
        tls=config.server_tls(cert_file=args.tls_cert_file, key_file=args.tls_key_file, client_ca_file=None),
        make_certificates=args.make_certificates,
        health_listen=_health_listen(args),
        kubernetes=_kubernetes(args),
        allow_no_api_key=args.allow_no_api_key,
        ready_file=args.ready_file,
        exit_with_parent=args.exit_with_parent,
    )
    if settings.kubernetes is None:
        from trainer_service.jobs.local import LocalJobs

        return await serve_jobs(settings, LocalJobs(settings))
    try:
        from trainer_service.jobs.kubernetes import KubernetesJobs
    except ImportError as exc:
        raise config.SettingsError(
            f"--backend kubernetes needs what {exc.name} belongs to; run `pip install 'gradwire[kubernetes]'`."
        ) from exc
    return await serve_jobs(settings, await KubernetesJobs.connect(settings, settings.kubernetes))


def _health_listen(args: argparse.Namespace) -> str | None:
    if args.health_listen is not None:
        config.split_address(args.health_listen)
    return args.health_listen


def _kubernetes(args: argparse.Namespace) -> config.KubernetesSettings | None:
    if args.backend != "kubernetes":
        return None
    if args.kubernetes_template is None:
        raise config.SettingsError(
            "--backend kubernetes needs --kubernetes-template: a StatefulSet and a Service, as the Helm chart has them."
        )
    return config.KubernetesSettings(
        template=args.kubernetes_template,
        namespace=args.kubernetes_namespace,
        name=args.kubernetes_name,
        address=args.kubernetes_address,
        accelerator_label=args.kubernetes_accelerator_label,
        accelerator_resource=args.kubernetes_accelerator_resource,
        pending_timeout_s=args.pending_timeout_s,
    )


async def _gateway(args: argparse.Namespace) -> int:
    try:
        from trainer_service.gateway.gateway import GatewaySettings
        from trainer_service.gateway.process import serve_gateway
        from trainer_service.gateway.trainers import Trainer, Trainers
    except ImportError as exc:
        raise config.SettingsError(f"The gateway needs `pip install 'gradwire[gateway]'`: {exc}.") from exc

    trainers = [Trainer(url, ca_file=args.trainer_ca_file) for url in args.trainer or ["http://127.0.0.1:7777"]]
    settings = GatewaySettings(
        data_dir=args.data_dir.resolve() / "gateway",
        session_grace_s=args.session_grace_s,
        api_keys=ApiKeys(config.read_api_keys(), args.api_key_file),
    )
    return await serve_gateway(
        settings,
        Trainers(trainers, dict(map(_alias, args.served_model_name))),
        listen=args.listen,
        ready_file=args.ready_file,
        exit_with_parent=args.exit_with_parent,
    )


def _alias(text: str) -> tuple[str, str]:
    """("NAME", "MODEL") of NAME=MODEL, ("NAME", "") of NAME."""
    name, _, model = text.partition("=")
    return name, model


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--data-dir", type=Path, default=config.default_data_dir(), help="default: $GRADWIRE_HOME or ~/.gradwire"
    )
    common.add_argument(
        "--storage-url",
        default=os.environ.get("GRADWIRE_STORAGE_URL", ""),
        help="keep checkpoints there too, such as s3://bucket/prefix; default: $GRADWIRE_STORAGE_URL, or here alone",
    )
    common.add_argument(
        "--api-key-file", type=Path, help="a line: `key`, `name key` or `name key admin`; see docs/security.md"
    )
    common.add_argument("--allow-no-api-key", action="store_true", help="listen beyond loopback without a key")
    common.add_argument("--tls-cert-file", type=Path, help="PEM; with --tls-key-file: serve TLS")
    common.add_argument("--tls-key-file", type=Path, help="PEM; the certificate's private key")
    common.add_argument(
        "--health-listen", metavar="HOST:PORT", help="serve health there too, in plaintext, for a cluster's probes"
    )
    common.add_argument("--ready-file", type=Path, help="gets the address as JSON once listening")
    common.add_argument("--exit-with-parent", action="store_true", help="stop when stdin reaches its end")
    common.add_argument("--log-json", action="store_true", help="log one JSON object a line")
    common.add_argument("--log-level", default=os.environ.get("GRADWIRE_LOG_LEVEL", "INFO"), help="default: INFO")

    parser = argparse.ArgumentParser(prog="gradwire", description="The Gradwire server processes.")
    commands = parser.add_subparsers(required=True, metavar="{serve,jobs,gateway}")
    trainer = commands.add_parser("serve", parents=[common], help="serve one base model")
    trainer.set_defaults(command=_trainer)
    trainer.add_argument("--base-model", required=True, help="hub id or folder of a Hugging Face causal LM")
    trainer.add_argument(
        "--served-model-name",
        default="",
        metavar="NAME",
        help="what callers are told the model is called, who then need not know its folder; default: --base-model",
    )
    trainer.add_argument(
        "--alias", action="append", default=[], metavar="NAME", help="another name callers may give it; repeatable"
    )
    trainer.add_argument("--listen", default="127.0.0.1:7777", help="host:port; port 0 takes a free one")
    trainer.add_argument(
        "--gateway", metavar="HOST:PORT", help="serve clients of hosted services there too, as `gradwire gateway` does"
    )
    trainer.add_argument("--metrics-port", type=int, help="serve Prometheus metrics there; 0 takes a free port")
    trainer.add_argument("--metrics-host", default="127.0.0.1", help="default: 127.0.0.1")
    trainer.add_argument("--page", metavar="HOST:PORT", help="serve the live page there, such as 127.0.0.1:8080")
    trainer.add_argument(
        "--max-context-length", type=int, default=0, help="longest sequence, tokens; 0: the model's own"
    )
    trainer.add_argument(
        "--adapter-dir", type=Path, help="peft adapters that runs may start from; default: adapters in --data-dir"
    )
    trainer.add_argument(
        "--loss-module", default="", metavar="MODULE", help="take this Python module's LOSSES beside the built-in ones"
    )
    trainer.add_argument("--no-reflection", action="store_true", help="do not describe the services to grpcurl")
    trainer.add_argument("--drain-timeout-s", type=float, default=30.0, help="for queued work after SIGTERM")
    trainer.add_argument(
        "--detach-grace-s", type=float, default=180.0, help="how long a vanished client's graphs are kept"
    )
    trainer.add_argument(
        "--worker-start-timeout-s",
        type=float,
        default=300.0,
        help="a worker that starts or loads its model and gets no further for so long is started again; default: "
        "%(default)g; 0: never",
    )
    trainer.add_argument(
        "--worker-heartbeat-timeout-s",
        type=float,
        default=60.0,
        help="a ready worker that sends nothing for so long (stopped, or hanging as a whole; a busy one does send) is "
        "killed and replaced, and what it was doing is done again; default: %(default)g; 0: never",
    )
    trainer.add_argument(
        "--nproc-per-node", type=int, default=1, metavar="RANKS", help="worker processes that share model and batches"
    )
    trainer.add_argument(
        "--collective-timeout-s",
        type=float,
        default=600.0,
        help="how long ranks wait for one another within an operation before all are started again; "
        "default: %(default)g",
    )
    _add_durability(trainer)
    defaults = config.Limits()
    trainer.add_argument("--max-runs", type=int, default=defaults.max_runs, help="held at once; default: %(default)s")
    trainer.add_argument("--max-runs-per-key", type=int, default=0, help="of one API key; default: --max-runs alone")
    trainer.add_argument("--max-disk-bytes", type=int, default=0, help="under --data-dir; saves beyond are refused")
    trainer.add_argument("--tls-client-ca-file", type=Path, help="PEM; ask clients for a certificate from this root")
    config.EngineSettings.add_arguments(trainer.add_argument_group("memory and precision"))
    jobs = commands.add_parser("jobs", parents=[common], help="start and stop trainers, here or in a cluster")
    jobs.set_defaults(command=_jobs)
    jobs.add_argument("--listen", default="127.0.0.1:7070", help="host:port; port 0 takes a free one")
    jobs.add_argument(
        "--model-dir",
        type=Path,
        help="models that callers may name by their path below it; those who are no admins name hub ids or these; "
        "default: models in --data-dir",
    )
    plane = config.JobsConfig()
    jobs.add_argument("--max-jobs", type=int, default=plane.max_jobs, help="at once; default: %(default)s")
    jobs.add_argument("--max-jobs-per-key", type=int, default=0, help="of one API key; default: --max-jobs alone")
    jobs.add_argument(
        "--embedded",
        action="store_true",
        help="serve the program that started it alone: every caller is told what an admin is, and jobs end with it",
    )
    jobs.add_argument(
        "--make-certificates",
        action="store_true",
        help="make each job's trainer a certificate, which its owner is handed, in place of --tls-cert-file",
    )
    _add_kubernetes(jobs)
    _add_gateway(commands.add_parser("gateway", parents=[common], help="serve clients of hosted services over HTTP"))
    return parser


def _add_kubernetes(jobs: argparse.ArgumentParser) -> None:
    jobs.add_argument("--backend", choices=("local", "kubernetes"), default="local", help="default: %(default)s")
    there = config.KubernetesSettings(Path())
    group = jobs.add_argument_group("in a cluster (--backend kubernetes)")
    group.add_argument(
        "--kubernetes-template", type=Path, metavar="YAML", help="the StatefulSet and Service that jobs are made from"
    )
    group.add_argument("--kubernetes-namespace", default="", help="default: the pod's own, or the kubeconfig's")
    group.add_argument("--kubernetes-name", default=there.name, help="of this control plane; a label of its jobs")
    group.add_argument(
        "--kubernetes-address",
        default=there.address,
        help="where clients reach a job's trainer, as its Service's {name}, {namespace}, {port}, {node_port}; "
        "default: %(default)s",
    )
    group.add_argument(
        "--kubernetes-accelerator-label",
        default=there.accelerator_label,
        help="node label that accelerator_type is looked for in; default: %(default)s",
    )
    group.add_argument(
        "--kubernetes-accelerator-resource", default=there.accelerator_resource, help="default: %(default)s"
    )
    group.add_argument(
        "--pending-timeout-s",
        type=float,
        default=there.pending_timeout_s,
        help="how long a pod may find no node, volume or image; default: %(default)g",
    )


def _add_gateway(gateway: argparse.ArgumentParser) -> None:
    gateway.set_defaults(command=_gateway)
    gateway.add_argument("--listen", default="127.0.0.1:8000", help="host:port; port 0 takes a free one")
    gateway.add_argument(
        "--trainer",
        action="append",
        metavar="URL",
        help="to stand before; once for each; default: http://127.0.0.1:7777",
    )
    gateway.add_argument("--trainer-ca-file", type=Path, help="PEM; roots of https:// trainers' certificates")
    gateway.add_argument(
        "--served-model-name",
        "--alias",
        action="append",
        default=[],
        metavar="NAME[=MODEL]",
        help="a name that clients may call a model by, the first before its own; once for each",
    )
    gateway.add_argument(
        "--session-grace-s",
        type=float,
        default=120.0,
        help="a client silent for so long is taken for gone, and its runs are deleted; default: %(default)g",
    )


def _add_durability(trainer: argparse.ArgumentParser) -> None:
    kept, how = config.Retention(), config.Durability()
    trainer.add_argument("--runs-dir", type=Path, help="journals and snapshots; default: runs in --data-dir")
    trainer.add_argument(
        "--journal-sync", choices=("normal", "full"), default=how.sync, help="full: survive power loss too, at a price"
    )
    trainer.add_argument("--keep-operations", type=int, default=kept.keep_operations, help="in a journal; 0: no limit")
    trainer.add_argument("--keep-s", type=float, default=kept.keep_s, help="age of a journal's operations; 0: no limit")
    trainer.add_argument("--keep-bytes", type=int, default=kept.keep_bytes, help="of a journal; default: %(default)s")
    trainer.add_argument("--keep-everything", action="store_true", help="journals and snapshots grow for ever")
    trainer.add_argument(
        "--snapshot-interval-s", type=float, default=how.snapshots.interval_s, help="default: %(default)g; 0: never"
    )
    trainer.add_argument(
        "--snapshot-steps", type=int, default=0, help="optimizer steps between snapshots; 0: time alone"
    )
    trainer.add_argument(
        "--idle-lease-s", type=float, default=how.idle_lease_s, help="until an idle run is unloaded to disk; 0: never"
    )


if __name__ == "__main__":
    sys.exit(main())
