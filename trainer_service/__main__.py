"""`gradwire serve`, `worker`, `jobs` and `gateway`: reads settings, builds the floors, wires them."""

import argparse
import asyncio
import contextlib
import os
import sys
from typing import TYPE_CHECKING

from trainer_service import open_files
from trainer_service.command_lines import SettingsError, add_options, read_options
from trainer_service.config import GatewayConfig, JobsConfig, LogSettings, NodeConfig, TrainerConfig
from trainer_service.join_token import read_join_token
from trainer_service.logs import configure_logging
from trainer_service.startup_checks import (
    check_base_model,
    check_gateway_beside,
    check_page,
    check_server,
    read_api_keys,
    read_umask,
)
from trainer_service.tracing import exporting

if TYPE_CHECKING:
    from trainer_service.fleet.nodes import Nodes
    from trainer_service.fleet.worker import Worker
    from trainer_service.page.server import PageServer
    from trainer_service.trainer import TrainerServer


def main() -> int:
    """Exit code: 0 after a clean stop, 1 if the server could not run, 2 for settings that cannot be used."""
    arguments = _parser().parse_args()
    log = read_options(LogSettings, arguments)
    configure_logging(as_json=log.log_json, level=log.log_level)
    open_files.raise_limit()
    try:
        # Before anything is written. Child processes inherit it.
        os.umask(read_umask())
        return asyncio.run(arguments.command(arguments))
    except (SettingsError, OSError) as exc:
        print(f"gradwire: {exc}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gradwire", description="The Gradwire server processes.")
    commands = parser.add_subparsers(required=True, metavar="{serve,worker,jobs,gateway}")
    serve = commands.add_parser("serve", help="serve one base model")
    serve.set_defaults(command=_serve)
    add_options(serve, TrainerConfig)
    jobs = commands.add_parser("jobs", help="start and stop trainers, here or in a cluster")
    jobs.set_defaults(command=_jobs)
    # It chooses a group of settings, so it is not a setting itself.
    jobs.add_argument(
        "--backend", choices=("local", "kubernetes"), default="local", help="where trainers run; default: %(default)s"
    )
    add_options(jobs, JobsConfig)
    worker = commands.add_parser("worker", help="take part in the worker of a trainer on another machine")
    worker.set_defaults(command=_worker)
    add_options(worker, NodeConfig)
    gateway = commands.add_parser("gateway", help="serve clients of hosted services over HTTP")
    gateway.set_defaults(command=_gateway)
    add_options(gateway, GatewayConfig)
    return parser


async def _serve(arguments: argparse.Namespace) -> int:
    from trainer_service.fleet.gpus import count_gpus, local_world_size
    from trainer_service.fleet.mesh import check_cut, check_mesh
    from trainer_service.fleet.supervisor import WorkerSupervisor
    from trainer_service.processes import told_to_stop, write_ready_file
    from trainer_service.trainer import TrainerServer
    from trainer_service.worker_config import WorkerConfig

    config = read_options(TrainerConfig, arguments, api_keys=read_api_keys())
    guarded = check_server(config)
    num_gpus = await count_gpus()
    nproc_per_node = local_world_size(
        config.ranks.nproc_per_node, num_gpus=num_gpus, base_dtype=config.engine.base_dtype
    )
    check_mesh(config.ranks, local_world_size=nproc_per_node, nnodes=config.nodes.nnodes)
    check_cut(config.engine, tp_size=config.ranks.tp_size)
    nodes = _nodes(config, num_gpus=num_gpus, local_world_size=nproc_per_node)
    if config.page_listen is not None:
        check_page(config.page_listen, guarded=guarded)
    check_base_model(config.base_model)
    check_gateway_beside(config)
    _check_storage_url(config.storage_url)
    worker = WorkerSupervisor(
        WorkerConfig(
            base_model=config.base_model,
            served_model_name=config.served_model_name,
            max_context_length=config.max_context_length,
            loss_module=config.loss_module,
            engine=config.engine,
            ranks=config.ranks,
            checkpoint_dir=config.checkpoint_dir,
            max_runs=config.limits.max_runs,
        ),
        timeouts=config.worker_timeouts,
        max_message_bytes=config.limits.max_message_bytes,
        local_world_size=nproc_per_node,
        nodes=nodes,
    )
    traces = contextlib.ExitStack()
    server = TrainerServer(config, worker, traces.enter_context(exporting(config.otlp_endpoint)))
    # Before anything is started, so that a signal in between is not lost.
    told = asyncio.create_task(told_to_stop(exit_with_parent=config.exit_with_parent))
    stop_metrics, metrics_address, page = None, "", None
    beside = contextlib.AsyncExitStack()
    try:
        if config.metrics_listen is not None:
            metrics_address, stop_metrics = server.metrics.serve(config.metrics_listen)
        await server.start()
        if config.page_listen is not None:
            page = _page(server, worker, config.page_listen)
            await page.start()
        await worker.start()
        if config.gateway_listen is not None:
            await beside.enter_async_context(_gateway_beside(config, config.gateway_listen, server.address))
        if config.ready_file is not None:
            addresses = {"address": server.address, "metrics_address": metrics_address}
            write_ready_file(config.ready_file, **addresses, page_url="" if page is None else page.url)
        await asyncio.wait([told, worker.gave_up], return_when=asyncio.FIRST_COMPLETED)
    finally:
        await beside.aclose()
        await server.drain()
        if page is not None:
            await page.stop()
        if stop_metrics is not None:
            stop_metrics()
        traces.close()
        told.cancel()
    if worker.gave_up.done():
        print(f"gradwire: {worker.gave_up.result()}", file=sys.stderr)
        return 1
    return 0


def _nodes(config: TrainerConfig, *, num_gpus: int, local_world_size: int) -> "Nodes | None":
    """The other machines that --nnodes asks for."""
    settings = config.nodes
    if settings.nnodes == 1:
        if settings.rdzv_endpoint or settings.join_token_file is not None:
            raise SettingsError("--rdzv-endpoint and --join-token-file are for several nodes; add --nnodes.")
        return None
    if not settings.rdzv_endpoint:
        raise SettingsError(f"--nnodes {settings.nnodes} needs --rdzv-endpoint HOST:PORT, where the others join.")
    from trainer_service.fleet.join_policy import JoinPolicy
    from trainer_service.fleet.nodes import Nodes

    policy = JoinPolicy(
        token=read_join_token(settings.join_token_file),
        nnodes=settings.nnodes,
        base_model=config.base_model,
        num_gpus=num_gpus,
        local_world_size=local_world_size,
        shared=(config.data_dir, *(() if config.runs_dir is None else (config.runs_dir,))),
    )
    return Nodes(settings, policy, tls=config.tls)


async def _worker(arguments: argparse.Namespace) -> int:
    from trainer_service.fleet.joining import serve_node

    config = read_options(NodeConfig, arguments)
    return await serve_node(config, read_join_token(config.join_token_file))


def _gateway_beside(
    config: TrainerConfig, listen: str, trainer_address: str
) -> contextlib.AbstractAsyncContextManager[None]:
    """The gateway that --gateway asks for."""
    from trainer_service.gateway_child import gateway_child

    return gateway_child(
        GatewayConfig(
            listen=listen,
            trainers=(f"http://{trainer_address}",),
            data_dir=config.data_dir,
            ready_file=config.data_dir / "gateway" / "ready.json",
            exit_with_parent=True,
            api_key_file=config.api_key_file,
            allow_no_api_key=config.allow_no_api_key,
            log_json=config.log_json,
            log_level=config.log_level,
        )
    )


def _page(server: "TrainerServer", worker: "Worker", listen: str) -> "PageServer":
    # Imported only for a page: its packages are an extra.
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
    """Refuses a URL with an unknown scheme, or one whose package is not installed."""
    from trainer_service.checkpoints.object_store import Storage

    try:
        if url:
            Storage(url)
    except ValueError as exc:
        raise SettingsError(f"--storage-url: {exc}") from exc


async def _jobs(arguments: argparse.Namespace) -> int:
    from trainer_service.control_plane import serve_jobs

    config = read_options(JobsConfig, arguments, api_keys=read_api_keys())
    check_server(config)
    # Reported now rather than by the first trainer.
    _check_storage_url(config.storage_url)
    in_cluster = arguments.backend == "kubernetes"
    if in_cluster and config.kubernetes is None:
        raise SettingsError(
            "--backend kubernetes needs --kubernetes-template: a StatefulSet and a Service, as the Helm chart has them."
        )
    if not in_cluster and config.kubernetes is not None:
        raise SettingsError("--kubernetes-… and --pending-timeout-s are options of --backend kubernetes; add it.")
    if config.kubernetes is None:
        from trainer_service.jobs.local import LocalJobs

        return await serve_jobs(config, LocalJobs(config))
    try:
        from trainer_service.jobs.kubernetes import KubernetesJobs
    except ImportError as exc:
        raise SettingsError(
            f"--backend kubernetes needs the package of {exc.name}; run `pip install 'gradwire[kubernetes]'`."
        ) from exc
    return await serve_jobs(config, await KubernetesJobs.connect(config, config.kubernetes))


async def _gateway(arguments: argparse.Namespace) -> int:
    try:
        from trainer_service.gateway.process import serve_gateway
    except ImportError as exc:
        raise SettingsError(f"The gateway needs `pip install 'gradwire[gateway]'`: {exc}.") from exc

    config = read_options(GatewayConfig, arguments, api_keys=read_api_keys())
    check_server(config)
    return await serve_gateway(config)


if __name__ == "__main__":
    sys.exit(main())
