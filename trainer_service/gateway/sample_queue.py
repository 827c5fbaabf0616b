"""Sends sample requests to trainers: equal prompts together, no more at once than a trainer takes."""

import asyncio
import hashlib
import itertools
import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

import grpc.aio
from gradwire.errors import GradwireError, from_rpc_error
from gradwire.v1.sampling_service_pb2 import PromptLogprobs, SampleRequest

from trainer_service.gateway.outcomes import Outcome
from trainer_service.gateway.retries import is_passing
from trainer_service.gateway.sample_requests import CollectedSample, add_samples, sample_outcome
from trainer_service.gateway.trainers import Trainer, metadata
from trainer_service.tracing import trace_headers

logger = logging.getLogger(__name__)

_LINGER_S, _MAX_LINGER_S = 0.01, 0.2
"""How long requests wait for an equal one behind the last where nothing else is under way, and in all; a client sends a
group's requests one behind the other, and a busy one takes its time."""
_LINGER_CALLS = 8
"""Each time so many calls are under way, requests wait that much longer: what has many to do loses little by it, and
whoever sends many requests is slow about it."""
_MAX_DELAY_S = 1.0
_MAX_DEATHS = 3
"""Deaths of the worker during one call after which it is given up."""
_MESSAGE_INTERVAL_MS = 1000
"""Nobody reads along: an answer is told whole."""


@dataclass(eq=False)
class _QueuedRequest:
    """One request's part of a Sample call."""

    request: SampleRequest
    future: asyncio.Future[Outcome]
    trace: Mapping[str, str]
    """The context of whoever asks. A call for several continues the first one's."""


@dataclass(eq=False)
class _Group:
    """Equal requests."""

    trainer: Trainer
    key: str = field(repr=False)
    since_s: float
    """When the group's first request came."""
    last_s: float
    """When the group's last request came."""
    asked: list[_QueuedRequest] = field(default_factory=list)
    due: bool = False
    """Whether it has waited for others long enough."""


class SampleQueue:
    """Requests that wait to be sampled, and those under way.

    Args:
        max_in_flight: Sample calls at once.
        max_num_samples: Samples of one call.
    """

    def __init__(self, *, max_in_flight: int, max_num_samples: int) -> None:
        self.max_in_flight = max_in_flight
        self.max_num_samples = max_num_samples
        self._groups: OrderedDict[bytes, _Group] = OrderedDict()
        self._calls: dict[asyncio.Task[None], list[_QueuedRequest]] = {}
        self._numbers = itertools.count()
        self.merged = 0
        """How many requests shared another one's call."""

    def add(self, request: SampleRequest, trainer: Trainer, key: str) -> asyncio.Future[Outcome]:
        """Puts a request in the line; its future is never failed, but cancelled when the request is given up."""
        loop = asyncio.get_running_loop()
        asked = _QueuedRequest(request, loop.create_future(), trace_headers.get())
        name = self._name(request, trainer, key)
        now = loop.time()
        group = self._groups.get(name)
        if group is None:
            group = self._groups[name] = _Group(trainer, key, now, now)
            loop.call_later(self._linger_s, self._is_due, group)
        group.last_s = now
        group.asked.append(asked)
        return asked.future

    def _name(self, request: SampleRequest, trainer: Trainer, key: str) -> bytes:
        """Equal for requests that may share a call: those of one caller that differ in num_samples alone, and have no
        seed, since which sample is whose then makes no difference."""
        if request.sampling_params.HasField("seed"):
            return next(self._numbers).to_bytes(8)
        num_samples, request.num_samples = request.num_samples, 1
        equal = request.SerializeToString(deterministic=True)
        request.num_samples = num_samples
        return hashlib.sha256(b"\0".join((trainer.url.encode(), key.encode(), equal))).digest()

    @property
    def _linger_s(self) -> float:
        return min(_MAX_LINGER_S, _LINGER_S * (1 + len(self._calls) / _LINGER_CALLS))

    def _is_due(self, group: _Group) -> None:
        loop = asyncio.get_running_loop()
        wait_s = min(group.last_s + self._linger_s, group.since_s + _MAX_LINGER_S) - loop.time()
        if wait_s > 0 and sum(asked.request.num_samples for asked in group.asked) < self.max_num_samples:
            loop.call_later(wait_s, self._is_due, group)
            return
        group.due = True
        self._start()

    def _start(self) -> None:
        """Starts what may start, in the order it came."""
        for name, group in list(self._groups.items()):
            if len(self._calls) >= self.max_in_flight:
                return
            group.asked = [asked for asked in group.asked if not asked.future.cancelled()]
            while group.due and group.asked and len(self._calls) < self.max_in_flight:
                asked = self._cut(group)
                self.merged += len(asked) - 1
                task = asyncio.get_running_loop().create_task(self._call(group.trainer, group.key, asked))
                self._calls[task] = asked
                task.add_done_callback(self._ended)
                for one in asked:
                    one.future.add_done_callback(lambda _, task=task, asked=asked: _give_up(task, asked))
            if not group.asked and group.due:
                del self._groups[name]

    def _cut(self, group: _Group) -> list[_QueuedRequest]:
        """As many of a group as one call takes; at least one, whose size is then the trainer's to judge."""
        total, count = 0, 0
        for asked in group.asked:
            total += asked.request.num_samples
            if count and total > self.max_num_samples:
                break
            count += 1
        cut, group.asked = group.asked[:count], group.asked[count:]
        return cut

    def _ended(self, task: asyncio.Task[None]) -> None:
        asked = self._calls.pop(task)
        if not task.cancelled() and (exc := task.exception()) is not None:
            logger.error("A sample request failed.", exc_info=exc)
            for one in asked:
                if not one.future.done():
                    one.future.set_result(Outcome.failure(RuntimeError()))
        self._start()

    async def _call(self, trainer: Trainer, key: str, asked: list[_QueuedRequest]) -> None:
        request = SampleRequest()
        request.CopyFrom(asked[0].request)
        request.num_samples = sum(one.request.num_samples for one in asked)
        request.message_interval_ms = _MESSAGE_INTERVAL_MS
        delay_s, deaths = 0.05, 0
        while True:
            try:
                samples, prompt = await _sample(trainer, key, request, asked[0].trace)
                break
            except GradwireError as exc:
                # Others' requests fill the trainer, or it is away.
                deaths += exc.reason == "WORKER_DIED"
                # The request itself may be what the worker dies of.
                passing = is_passing(exc) and deaths < _MAX_DEATHS
                if not passing and (exc.reason != "LIMIT_EXCEEDED" or exc.retry_after_s is None):
                    for one in asked:
                        if not one.future.done():
                            one.future.set_result(Outcome.failure(exc))
                    return
            await asyncio.sleep(delay_s)
            delay_s = min(_MAX_DELAY_S, delay_s * 2)
        first = 0
        for one in asked:
            own = samples[first : first + one.request.num_samples]
            first += one.request.num_samples
            if not one.future.done():
                one.future.set_result(sample_outcome(own, prompt, one.request))

    async def close(self) -> None:
        """Gives up all requests."""
        for group in self._groups.values():
            for asked in group.asked:
                asked.future.cancel()
        calls = list(self._calls)
        for task in calls:
            task.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


def _give_up(task: asyncio.Task[None], asked: list[_QueuedRequest]) -> None:
    """Cancels a call that nobody waits for any more."""
    if all(one.future.cancelled() for one in asked):
        task.cancel()


async def _sample(
    trainer: Trainer, key: str, request: SampleRequest, trace: Mapping[str, str]
) -> tuple[list[CollectedSample], PromptLogprobs | None]:
    """One Sample call.

    Raises:
        GradwireError: What it ended with.
    """
    samples = [CollectedSample() for _ in range(request.num_samples)]
    prompt = None
    call = trainer.sampling.Sample(request, metadata=metadata(key, trace))
    try:
        async for response in call:
            add_samples(samples, response)
            if response.HasField("prompt"):
                prompt = response.prompt
    except grpc.aio.AioRpcError as exc:
        raise from_rpc_error(exc) from None
    finally:
        call.cancel()
    return samples, prompt
