"""Serves the page, on the trainer's own event loop: what it shows lives there, and it waits for nothing."""

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Generator

import uvicorn

from trainer_service.access import ApiKeys
from trainer_service.addresses import listens_on_loopback, split_address
from trainer_service.checkpoints.catalog import Catalog
from trainer_service.config import PAGE_CONNECTIONS, Limits, ServerTls
from trainer_service.fleet.worker import Worker
from trainer_service.page.feed import Feed
from trainer_service.page.guard import Guard
from trainer_service.page.routes import Routes
from trainer_service.page.sampling_box import SamplingBox
from trainer_service.page.sessions import Sessions
from trainer_service.page.views import Health
from trainer_service.runs.registry import Runs
from trainer_service.runs.run_metrics import RunMetrics
from trainer_service.runs.sampling import Sampling

logger = logging.getLogger(__name__)

_STOP_GRACE_S = 2


class PageServer:
    """The page of one trainer.

    Args:
        listen: host:port; port 0 takes a free one.
        api_keys: Keys that open it.
        tls: How it proves who it is, as the trainer does; None serves plaintext.
        limits: The most there may be.
        runs, metrics, sampling, catalog, worker: What it shows.
    """

    def __init__(
        self,
        listen: str,
        *,
        api_keys: ApiKeys,
        tls: ServerTls | None,
        limits: Limits,
        runs: Runs,
        metrics: RunMetrics,
        sampling: Sampling,
        catalog: Catalog,
        worker: Worker,
    ) -> None:
        self._listen = listen
        self._tls = tls
        self._socket = _bound(listen)
        host, port = self._socket.getsockname()[:2]
        sessions = Sessions(api_keys, port=port, secure=tls is not None)
        self.feed = Feed(runs, metrics, sampling, Health(worker), sessions)
        """What pages are told as it happens."""
        routes = Routes(
            sessions=sessions,
            feed=self.feed,
            runs=runs,
            catalog=catalog,
            box=SamplingBox(runs, sampling, limits),
            # A prompt may be written with six bytes a character.
            max_body_bytes=6 * limits.max_prompt_text_bytes + 4096,
        )
        self._server = _Server(_config(Guard(routes.app(), sessions), tls))
        self._serving: asyncio.Task[None] | None = None
        bracketed = f"[{host}]" if ":" in host else host
        self.url = f"http{'s' if tls else ''}://{bracketed}:{port}/"
        """Where it is."""
        if tls is None and api_keys.required and not listens_on_loopback(listen):
            logger.warning("The page's keys cross the network in plaintext; give --tls-cert-file, or put TLS in front.")

    async def start(self) -> None:
        """Serves."""
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]), name="page")
        while not self._server.started and not self._serving.done():  # noqa: ASYNC110  (uvicorn has no event for it)
            await asyncio.sleep(0.005)
        logger.info("The page is served.", extra={"fields": {"url": self.url}})

    async def stop(self) -> None:
        """Ends every page's connection."""
        self.feed.close()
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving
        self._socket.close()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Signals are the trainer's."""
        yield


def _config(app: Guard, tls: ServerTls | None) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http="h11",
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=PAGE_CONNECTIONS,
        timeout_keep_alive=20,
        timeout_graceful_shutdown=_STOP_GRACE_S,
        ssl_certfile=None if tls is None else str(tls.cert_file),
        ssl_keyfile=None if tls is None else str(tls.key_file),
        ssl_ca_certs=None if tls is None or tls.client_ca_file is None else str(tls.client_ca_file),
        ssl_cert_reqs=ssl.CERT_NONE if tls is None or tls.client_ca_file is None else ssl.CERT_REQUIRED,
    )


def _bound(listen: str) -> socket.socket:
    """A socket at an address.

    Raises:
        OSError: It cannot be had.
    """
    host, port = split_address(listen)
    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
        made.set_inheritable(False)
    except OSError as exc:
        made.close()
        raise OSError(f"cannot serve the page on {listen}: {exc.strerror or exc}") from exc
    return made
