"""Serves the page, on the trainer's event loop: what it shows lives there, and serving never blocks."""

import logging

from trainer_service.access import ApiKeys
from trainer_service.addresses import listens_on_loopback
from trainer_service.checkpoints.catalog import Catalog
from trainer_service.config import PAGE_CONNECTIONS, Limits, ServerTls
from trainer_service.fleet.worker import Worker
from trainer_service.http_server import HttpServer
from trainer_service.page.feed import Feed
from trainer_service.page.guard import Guard
from trainer_service.page.page_json import Health
from trainer_service.page.routes import Routes
from trainer_service.page.sampling_box import SamplingBox
from trainer_service.page.sessions import Sessions
from trainer_service.runs.registry import Runs
from trainer_service.runs.run_metrics import RunMetrics
from trainer_service.runs.sampling import SampleRequests

logger = logging.getLogger(__name__)

_STOP_GRACE_S = 2


class PageServer:
    """The page of one trainer.

    Args:
        listen: host:port; port 0 takes a free one.
        api_keys: The keys it accepts.
        tls: Certificates, as for the trainer; None serves plaintext.
        limits: The most a request may ask for.
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
        sampling: SampleRequests,
        catalog: Catalog,
        worker: Worker,
    ) -> None:
        self._server = HttpServer(listen, tls=tls)
        self.url = self._server.url
        """Where it is."""
        sessions = Sessions(api_keys, port=self._server.port, secure=tls is not None)
        self.feed = Feed(runs, metrics, sampling, Health(worker), sessions)
        """Live updates for open pages."""
        routes = Routes(
            sessions=sessions,
            feed=self.feed,
            runs=runs,
            catalog=catalog,
            box=SamplingBox(runs, sampling, limits),
            # JSON may take six bytes for a character of a prompt.
            max_body_bytes=6 * limits.max_prompt_text_bytes + 4096,
        )
        self._app = Guard(routes.app(), sessions)
        if tls is None and api_keys.required and not listens_on_loopback(listen):
            logger.warning("The page's keys cross the network in plaintext; give --tls-cert-file, or put TLS in front.")

    async def start(self) -> None:
        """Serves."""
        await self._server.start(self._app, stop_grace_s=_STOP_GRACE_S, max_connections=PAGE_CONNECTIONS)
        logger.info("The page is served.", extra={"fields": {"url": self.url}})

    async def stop(self) -> None:
        """Ends every page's connection."""
        self.feed.close()
        await self._server.stop()
