"""Sample requests on their way through the trainer: whose sampler, how many at once, what is cancelled."""

import asyncio
import uuid
from collections import Counter
from collections.abc import AsyncGenerator
from typing import TypeGuard

from gradwire.errors import GradwireError, error, from_status
from gradwire.v1 import sampling_service_pb2 as pb
from gradwire.v1.worker_service_pb2 import (
    WorkerCancelSample,
    WorkerCloseSampler,
    WorkerCommand,
    WorkerOpenSampler,
    WorkerSample,
)

from trainer_service.access import current_caller
from trainer_service.checkpoints.transfers import Transfers
from trainer_service.config import Limits
from trainer_service.field_limits import check_lease_ms, prompt_too_long
from trainer_service.fleet.calls import call
from trainer_service.fleet.worker import Reply, Worker
from trainer_service.paths import FROZEN_WEIGHTS, SamplerPath
from trainer_service.runs.registry import Runs


class SampleRequests:
    """Sends the current caller's requests to the worker and returns the tokens.

    Args:
        runs: The runs that frozen weights belong to.
        worker: Generates the tokens.
        transfers: Saved samplers; those that are only in the store are fetched first.
        limits: How many requests there may be.
    """

    def __init__(self, runs: Runs, worker: Worker, transfers: Transfers, limits: Limits) -> None:
        self._runs = runs
        self._worker = worker
        self._transfers = transfers
        self._limits = limits
        self._under_way: dict[str, str] = {}
        """Owners, by sample_id, of the requests that the worker is not done with, cancelled ones included."""

    def __len__(self) -> int:
        return len(self._under_way)

    async def sample(self, request: pb.SampleRequest) -> AsyncGenerator[pb.SampleResponse]:
        """Tokens as they come. Leaving the iteration early cancels the request.

        Raises:
            GradwireError: The sampler is not the caller's, LIMIT_EXCEEDED, or an error of the worker's.
        """
        owner = current_caller.get().owner
        self._refuse_too_many(owner)
        sample_id = uuid.uuid4().hex
        outcomes: asyncio.Queue[Reply | GradwireError] = asyncio.Queue()
        self._under_way[sample_id] = owner
        sent = done = False

        def deliver(outcome: Reply | GradwireError) -> None:
            if not _is_sampled(outcome):
                self._under_way.pop(sample_id, None)
            outcomes.put_nowait(outcome)

        try:
            self._check_prompt(request)
            await self._check(request.sampler, recent=True)
            command = WorkerCommand(sample=WorkerSample(sample_id=sample_id, request=request, owner=owner))
            sent = True
            self._worker.submit(command, deliver)
            while True:
                outcome = await outcomes.get()
                if _is_sampled(outcome):
                    yield outcome.event.sampled
                    continue
                done = True
                _raise_failure(outcome)
                return
        finally:
            if not sent:
                self._under_way.pop(sample_id, None)
            elif not done:
                command = WorkerCommand(cancel_sample=WorkerCancelSample(sample_id=sample_id))
                self._worker.submit(command, lambda _: None)

    async def open(self, sampler: pb.Sampler, *, lease_ms: int) -> None:
        """Loads a sampler; frozen weights stay for at least lease_ms.

        Raises:
            GradwireError: As sample.
        """
        check_lease_ms(lease_ms)
        await self._check(sampler)
        await call(self._worker, WorkerCommand(open_sampler=WorkerOpenSampler(sampler=sampler, lease_ms=lease_ms)))

    async def close(self, sampler: pb.Sampler) -> None:
        """Frees frozen weights; other samplers are left alone.

        Raises:
            GradwireError: As sample.
        """
        await self._check(sampler, fetch=False)
        if sampler.model_path and (path := SamplerPath.parse(sampler.model_path)).kind == FROZEN_WEIGHTS:
            self._runs.get(path.run_id).placement.frozen.closed(int(path.name))
        await call(self._worker, WorkerCommand(close_sampler=WorkerCloseSampler(sampler=sampler)))

    def _refuse_too_many(self, owner: str) -> None:
        """Bounds the requests under way, so that no owner keeps all others out."""
        limit, own = self._limits.max_sample_requests, Counter(self._under_way.values())
        if len(self) < limit or own[owner] < limit // len({*own, owner}) // 2:
            return
        raise error(
            "LIMIT_EXCEEDED",
            f"{len(self)} sample requests are under way, {own[owner]} of them yours, and this trainer takes at most "
            f"{limit} at once; wait for some, or ask for num_samples of one prompt.",
            retry_after_s=1.0,
            limit=limit,
            got=len(self) + 1,
        )

    def _check_prompt(self, request: pb.SampleRequest) -> None:
        """Refuses a prompt that is too long for the model before it costs the worker time."""
        ready, got = self._worker.ready, len(request.prompt.tokens)
        if ready is not None and got > ready.model.max_context_length:
            raise prompt_too_long(got, ready.model.max_context_length)

    async def _check(self, sampler: pb.Sampler, *, fetch: bool = True, recent: bool = False) -> None:
        """Checks that the current caller may use a sampler, and that the worker can have it, unless `fetch` is off."""
        if sampler.WhichOneof("source") != "model_path":
            self._runs.check_base_model(sampler.base_model)
            return
        path = SamplerPath.parse(sampler.model_path)
        if path.kind == FROZEN_WEIGHTS:
            run = self._runs.get(path.run_id)
            if fetch:
                await self._runs.bring_back_frozen(run, int(path.name))
        elif fetch:
            await self._transfers.fetch(sampler.model_path, recent=recent)
        else:
            await self._transfers.find(sampler.model_path, recent=True)


def _is_sampled(outcome: Reply | GradwireError) -> TypeGuard[Reply]:
    """Whether the outcome is tokens, so that more will come."""
    return not isinstance(outcome, GradwireError) and outcome.event.HasField("sampled")


def _raise_failure(outcome: Reply | GradwireError) -> None:
    if isinstance(outcome, GradwireError):
        raise outcome
    if outcome.event.done.HasField("error"):
        raise from_status(outcome.event.done.error)
