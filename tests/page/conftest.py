"""A trainer with a page and a fake worker, on a thread of its own, and Chromium to look at it."""

import asyncio
import contextlib
import dataclasses
import logging
import os
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from anyio.from_thread import start_blocking_portal
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.sampling_service_pb2 import STOP_REASON_LENGTH, SampledTokens, SampleResponse
from gradwire.v1.trainer_service_pb2 import CreateRunRequest, TrainRequest, TrainResponse
from gradwire.v1.worker_service_pb2 import WorkerCommand, WorkerDone, WorkerEvent

from tests.fakes import FakeWorker
from tests.front_end import FrontEnd, front_end
from trainer_service.access import ANYBODY, Caller, current_caller
from trainer_service.config import Limits
from trainer_service.fleet.worker import Deliver, Reply
from trainer_service.page.guard import HEADER
from trainer_service.page.server import PageServer
from trainer_service.runs.operation import Operation
from trainer_service.runs.run import Run

WORDS = (" one", " two", " <b>three</b>", " four")


class PageWorker(FakeWorker):
    """Measures what it is told, and samples words, each with its logprob, as they are let through."""

    measured: dict[str, float] = dataclasses.field(default_factory=dict)

    def __init__(self) -> None:
        super().__init__()
        self.measured = {"loss:sum": 4.0, "num_loss_tokens:sum": 2.0, "num_tokens:sum": 8.0}
        self.words = threading.Semaphore(0)
        """Release it to let a word through."""
        self._word_tasks: set[asyncio.Task[None]] = set()

    def _execute(self, run_id: str, request: TrainRequest) -> TrainResponse:
        response = super()._execute(run_id, request)
        if response.HasField("forward_backward"):
            response.forward_backward.metrics.update(self.measured)
        if response.HasField("optim_step"):
            response.optim_step.metrics["grad_norm:mean"] = 1.5
        return response

    def _sample(self, command: WorkerCommand, deliver: Deliver) -> None:
        def send(**event: Any) -> None:
            deliver(Reply(WorkerEvent(command_id=command.command_id, **event), memoryview(b"")))

        async def speak() -> None:
            for place, word in enumerate(WORDS):
                while not self.words.acquire(blocking=False):  # noqa: ASYNC110  (a test lets it on, from its thread)
                    await asyncio.sleep(0.005)
                last = place == len(WORDS) - 1
                tokens = SampledTokens(tokens=[place], logprobs=[-place * 2.0], text=word)
                if last:
                    tokens.stop_reason = STOP_REASON_LENGTH
                send(sampled=SampleResponse(samples=[tokens]))
            send(done=WorkerDone())

        if command.HasField("cancel_sample"):
            send(done=WorkerDone())
            return
        task = asyncio.get_running_loop().create_task(speak())
        self._word_tasks.add(task)


@dataclass
class PageTrainer:
    """One that is served."""

    url: str
    page: PageServer
    front: FrontEnd
    worker: PageWorker
    loop: asyncio.AbstractEventLoop

    def do(self, work: Coroutine[Any, Any, Any], caller: Caller = ANYBODY) -> Any:
        """Runs a coroutine where the trainer lives."""

        async def as_caller() -> Any:
            current_caller.set(caller)
            return await work

        return asyncio.run_coroutine_threadsafe(as_caller(), self.loop).result(20)

    def call(self, work: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        """Runs a function there."""

        async def called() -> Any:
            return work(*arguments, **named)

        return self.do(called())

    def make_run(self, name: str = "", caller: Caller = ANYBODY, **settings: Any) -> Run:
        return self.do(self.front.server.runs.create(CreateRunRequest(display_name=name, **settings)), caller)

    def make_runs(self, names: Iterable[str], caller: Caller = ANYBODY) -> list[Run]:
        """Many, at once."""

        async def made() -> list[Run]:
            requests = [CreateRunRequest(display_name=name) for name in names]
            return await asyncio.gather(*map(self.front.server.runs.create, requests))

        return self.do(made(), caller)

    def execute(self, run: Run, **operation: Any) -> TrainResponse:
        """One operation of a run, done."""

        async def executed() -> TrainResponse:
            return await run.execute(Operation.made(TrainRequest(seq_id=run.next_seq_id, **operation)))

        return self.do(executed())

    def train(self, run: Run, steps: int = 1, **metrics: float) -> None:
        """Steps, each behind one pass, and a custom loss's metrics where there are any."""
        for _ in range(steps):
            self.execute(run, forward_backward=ops.ForwardBackwardRequest())
            if metrics:
                self.execute(run, backward=ops.BackwardRequest(forward_seq_id=1, metrics=metrics))
            self.execute(run, optim_step=ops.OptimStepRequest(learning_rate=0.01))


@contextlib.contextmanager
def page_trainer(*, limits: Limits | None = None, **settings: Any) -> Iterator[PageTrainer]:
    """Starts one, and ends it. Settings are those of TrainerConfig."""
    faults = _Faults()
    logging.getLogger("trainer_service.page").addHandler(faults)
    try:
        with (
            start_blocking_portal(name="page-trainer") as portal,
            portal.wrap_async_context_manager(_page_trainer(limits=limits or Limits(max_runs=300), **settings)) as page,
        ):
            yield page
    finally:
        logging.getLogger("trainer_service.page").removeHandler(faults)
    assert faults.told == []


@contextlib.asynccontextmanager
async def _page_trainer(**settings: Any) -> AsyncIterator[PageTrainer]:
    worker = PageWorker()
    async with front_end(worker=worker, **settings) as front:
        server = front.server
        page = PageServer(
            "127.0.0.1:0",
            api_keys=server.api_keys,
            tls=server.config.tls,
            limits=server.config.limits,
            runs=server.runs,
            metrics=server.run_metrics,
            sampling=server.sampling,
            catalog=server.catalog,
            worker=worker,
        )
        await page.start()
        try:
            yield PageTrainer(page.url, page, front, worker, asyncio.get_running_loop())
        finally:
            worker.words.release(10_000)
            await page.stop()


class _Faults(logging.Handler):
    """Remembers what the page complained of: a page that goes on all the same must not hide a fault."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(f"{record.getMessage()} {record.exc_info}")


ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def _chromium() -> str | None:
    return os.environ.get("GRADWIRE_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, driven by playwright. Tests that need one are skipped where there is none.

    No longer than a module: while playwright is there its event loop runs in this thread, and tests that are coroutines
    cannot.
    """
    path = _chromium()
    if path is None:
        pytest.skip("There is no Chromium here; scripts/test_page.sh installs Debian's, as root.")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; see the dev extra")
    with playwright.sync_playwright() as driver:
        # Its profile is a new folder, which playwright removes.
        opened = driver.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        yield opened
        opened.close()


@dataclass
class Looked:
    """What a browser noticed beside what it shows."""

    errors: list[str] = dataclasses.field(default_factory=list)
    """Console errors and warnings, exceptions, answers the console is silent about."""
    foreign: list[str] = dataclasses.field(default_factory=list)
    """Requests to any host but the page's."""
    dialogs: list[str] = dataclasses.field(default_factory=list)
    """Of alert() and the like, which the page has none of."""


@pytest.fixture
def looked() -> Iterator[Looked]:
    """Every browser test ends with nothing having gone wrong out of sight."""
    looked = Looked()
    yield looked
    assert (looked.errors, looked.foreign, looked.dialogs) == ([], [], [])


@pytest.fixture
def open_page(browser: Any, looked: Looked) -> Iterator[Callable[..., Any]]:
    """Opens a page in a profile of its own: open_page(url, width=…, scheme="light")."""
    with contextlib.ExitStack() as stack:

        def open_page(url: str, *, width: int = 1440, scheme: str = "light") -> Any:
            context = browser.new_context(
                viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
            )
            stack.callback(context.close)
            context.set_default_timeout(15_000)
            page = context.new_page()
            host = url.split("/")[2]

            def note(message: Any) -> None:
                if message.type in ("error", "warning"):
                    looked.errors.append(message.text)

            page.on("console", note)
            page.on("pageerror", lambda exc: looked.errors.append(str(exc)))
            page.on("request", lambda one: None if one.url.split("/")[2] == host else looked.foreign.append(one.url))

            def dismiss(dialog: Any) -> None:
                looked.dialogs.append(dialog.message)
                dialog.dismiss()

            page.on("dialog", dismiss)
            page.goto(url)
            return page

        yield open_page


@pytest.fixture
def shots() -> Path | None:
    """Where screenshots go for people to look at: $GRADWIRE_SHOTS; None takes none."""
    folder = os.environ.get("GRADWIRE_SHOTS")
    if not folder:
        return None
    Path(folder).mkdir(parents=True, exist_ok=True)
    return Path(folder)


POST = {HEADER: "1", "content-type": "application/json"}
