"""The client of one sampler: frozen parameters that generate."""

import asyncio
import contextlib
import functools
import queue
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from concurrent.futures import Future as ConcurrentFuture
from dataclasses import dataclass
from typing import Any

import grpc.aio

from gradwire._client.async_twins import awaited, off_thread
from gradwire._client.loop import LOOP
from gradwire._client.ported_names import RefusesTinkerNames, refuse_given
from gradwire._client.retries import Backoff, is_passing
from gradwire._client.sampling_wire import STOP_REASONS, Gathered, sample_request
from gradwire._client.tokenizer_client import load_tokenizer
from gradwire._client.tracing import CallSpan, start_span
from gradwire._client.transport import Connection
from gradwire.errors import GradwireError, OperationCancelledError
from gradwire.futures import APIFuture
from gradwire.types import SampledToken, SampleResponse, SamplingParams
from gradwire.v1 import sampling_service_pb2 as pb
from gradwire.v1.sampling_service_pb2_grpc import SamplingServiceStub

_CLOSE_TIMEOUT_S = 10.0
LEASE_MS = 60_000
"""How long the trainer keeps frozen weights whose client fell silent from making room for others."""
_RENEWALS_PER_LEASE = 4
_MAX_DEATHS = 3
"""Deaths of the worker during one request after which it is given up."""
_GATHERED_INTERVAL_MS = 1000
"""Between messages of a sample that nobody reads along."""

RETRIES_ITSELF = "calls are tried again by themselves until they time out."
NO_STABILITY_INFO = "there is no loss that reads it."
_NO_ALTERNATIVES = "nothing is drawn at places of the prompt; topk_prompt_logprobs gives what is likeliest there."


@dataclass(frozen=True)
class SamplerSource:
    """What names a sampler to the trainer; model_path "" is the base model."""

    base_model: str = ""
    model_path: str = ""

    def message(self) -> pb.Sampler:
        """The same for the wire."""
        return pb.Sampler(model_path=self.model_path) if self.model_path else pb.Sampler(base_model=self.base_model)


class SamplingClient(RefusesTinkerNames):
    """Generates from the base model, a checkpoint, or frozen weights. Made by ServiceClient and TrainingClient.

    Calls return futures at once; make many, and the trainer works on them together. It samples from frozen
    parameters: later optimizer steps do not change it. Usable from any thread.

    Logprobs are natural log and those of the model's own distribution, as forward of the same parameters computes them:
    temperature, top_k and top_p affect which tokens are chosen, not the logprobs. A loss that weighs by probabilities
    (importance_sampling, ppo) therefore takes them as they are from samples drawn at temperature 1 with neither top_k
    nor top_p; from others it corrects for the model's distribution, not for the narrower one they were drawn from.

    Frozen weights stay while their client is there: they make no room for newer ones, and the trainer refuses more than
    max_frozen_weights (get_server_info) at once. Close clients that are done with, or let go of them.

    It can be pickled, once its sampler is there (pickling waits for that): the copy in another process has a connection
    of its own to the same sampler. Frozen weights live as long as the client they were made with, so keep that one. The
    API key goes along only in the arguments of a process that multiprocessing starts ("spawn" or "forkserver"), over
    its private pipe; no other pickle holds it, and who unpickles one takes GRADWIRE_API_KEY from the environment.

    Args:
        connection: To the trainer.
        source: Names the sampler, now or once an operation has been answered.
        timeout_s: Longest that one call may take, seconds.
        owner: Whether frozen weights end with this client.
    """

    def __init__(
        self,
        connection: Connection,
        source: "SamplerSource | ConcurrentFuture[SamplerSource]",
        *,
        timeout_s: float = 3600.0,
        owner: bool = True,
    ) -> None:
        self._connection = connection
        self._timeout_s = timeout_s
        self._source: ConcurrentFuture[SamplerSource]
        if isinstance(source, SamplerSource):
            self._source = ConcurrentFuture()
            self._source.set_result(source)
        else:
            self._source = source
        self._finalizer = weakref.finalize(self, _let_go if owner else _nothing, connection, self._source)
        # At exit the loop is stopped; frozen weights go with their run.
        self._finalizer.atexit = False
        if owner:
            self._source.add_done_callback(functools.partial(_hold_open, connection, self._finalizer))

    # ── sampling ──────────────────────────────────────────────────────────────────────────────────────────────────

    def sample(
        self,
        prompt: Any,
        num_samples: int = 1,
        sampling_params: Any = None,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
        topk_sample_logprobs: int = 0,
        target_prompt_logprobs: Any = None,
        prompt_alt_tokens_k: int = 0,
        prompt_logprobs_last_n: int | None = None,
    ) -> APIFuture[SampleResponse]:
        """Continues a prompt. Cancelling the future, or the coroutine that awaits it, frees its place on the trainer.

        Args:
            prompt: ModelInput, ours or tinker's, or token ids.
            num_samples: Samples, whose prompt is computed once.
            sampling_params: SamplingParams, ours or tinker's; None takes the defaults.
            include_prompt_logprobs: Answer with the logprobs of the prompt's tokens too.
            topk_prompt_logprobs: Answer with so many likeliest tokens at each place of the prompt too.
            topk_sample_logprobs: Answer with so many likeliest tokens at each place of the samples too.
            target_prompt_logprobs: Token ids to answer with the logprobs of: integers [len(prompt) - 1, K], whose row i
                is about prompt[i + 1]; -1 asks for nothing.
            prompt_alt_tokens_k: Must be 0.
            prompt_logprobs_last_n: Answer about the last so many tokens of the prompt alone; of those before nothing is
                computed, and they are None. Needs include_prompt_logprobs or topk_prompt_logprobs.

        Raises:
            InvalidArgumentError: An argument that cannot be sent. Errors found by the trainer come through the future.
        """
        refuse_given(_NO_ALTERNATIVES, prompt_alt_tokens_k=prompt_alt_tokens_k)
        request = self._request(
            prompt,
            num_samples,
            sampling_params,
            include_prompt_logprobs=include_prompt_logprobs,
            topk_prompt_logprobs=topk_prompt_logprobs,
            topk_sample_logprobs=topk_sample_logprobs,
            target_prompt_logprobs=target_prompt_logprobs,
            prompt_logprobs_last_n=prompt_logprobs_last_n,
        )
        span = start_span("sample", num_samples=num_samples)
        return APIFuture(LOOP.submit(self._gather(request, span)), "sample", given_up_with_waiter=True)

    def stream(self, prompt: Any, num_samples: int = 1, sampling_params: Any = None) -> Iterator[SampledToken]:
        """Continues a prompt and yields tokens as they come; those of several samples take turns.

        Leaving the loop early (`break`, or closing the iterator) ends the request and frees its place on the trainer.

        Args:
            prompt: As in `sample`.
            num_samples: As in `sample`.
            sampling_params: As in `sample`.

        Raises:
            GradwireError: What the call failed with, after the last token that arrived.
        """
        request = self._request(prompt, num_samples, sampling_params)
        return self._iterate(request, start_span("stream", num_samples=num_samples))

    def compute_logprobs(self, prompt: Any, prompt_logprobs_last_n: int | None = None) -> APIFuture[list[float | None]]:
        """The logprob of every token of a prompt given those before it, natural log; None for the first.

        Args:
            prompt: As in `sample`.
            prompt_logprobs_last_n: As there.
        """
        request = self._request(
            prompt,
            1,
            SamplingParams(max_tokens=0),
            include_prompt_logprobs=True,
            prompt_logprobs_last_n=prompt_logprobs_last_n,
        )

        span = start_span("compute_logprobs")

        async def compute() -> list[float | None]:
            return (await self._gather(request, span)).prompt_logprobs or [None]

        return APIFuture(LOOP.submit(compute()), "compute_logprobs", given_up_with_waiter=True)

    # ── about the sampler ─────────────────────────────────────────────────────────────────────────────────────────

    @property
    def model_path(self) -> str:
        """gradwire:// path of the checkpoint or frozen weights, once there; "" for the base model."""
        return APIFuture(self._source, "the sampler").result().model_path

    def result(self, timeout: float | None = None) -> "SamplingClient":
        """Returns this client once its sampler exists. It is usable before: its calls wait for the sampler.

        Raises:
            GradwireError: Why the sampler could not be made.
        """
        APIFuture(self._source, "the sampler").result(timeout)
        return self

    async def result_async(self, timeout: float | None = None) -> "SamplingClient":
        """As `result`, for coroutines."""
        await APIFuture(self._source, "the sampler").result_async(timeout)
        return self

    def __await__(self) -> Generator[Any, None, "SamplingClient"]:
        return self.result_async().__await__()

    def get_tokenizer(self) -> Any:
        """The base model's tokenizer, fetched from the trainer and loaded with transformers."""
        return load_tokenizer(self._connection)

    def get_base_model(self, *, timeout_s: float = 30.0) -> str:
        """The base model, as the trainer calls it; asks the trainer."""
        source = APIFuture(self._source, "the sampler").result(timeout_s)
        return _open(self._connection, source, timeout_s)

    sample_async = awaited(sample)
    compute_logprobs_async = awaited(compute_logprobs)
    get_base_model_async = off_thread(get_base_model)
    get_tokenizer_async = off_thread(get_tokenizer)

    def close(self) -> None:
        """Frees frozen weights on the trainer. A client that is garbage-collected does the same."""
        self._finalizer()

    def __enter__(self) -> "SamplingClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> Any:
        source = APIFuture(self._source, "the sampler").result()
        return _sampling_client, (self._connection, source, self._timeout_s)

    def __copy__(self) -> "SamplingClient":
        return self

    def __deepcopy__(self, _: Any) -> "SamplingClient":
        return self

    # ── inside ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _request(self, *arguments: Any, **named: Any) -> pb.SampleRequest:
        """See sample_request."""
        if not self._finalizer.alive:
            raise OperationCancelledError("This SamplingClient is closed; make a new one.", reason="CANCELLED")
        return sample_request(*arguments, **named)

    async def _responses(
        self, request: pb.SampleRequest, span: CallSpan, begin_again: Callable[[], object] | None = None
    ) -> AsyncGenerator[pb.SampleResponse]:
        """The trainer's messages. The call is retried while the trainer is away or starting, and where its worker dies:
        until the first message, or all along where `begin_again` forgets those that came."""
        metadata = [*self._connection.metadata, *span.headers.items()]
        with span:
            async with contextlib.aclosing(self._retried(request, metadata, begin_again)) as responses:
                async for response in responses:
                    yield response

    async def _retried(
        self, request: pb.SampleRequest, metadata: list[tuple[str, str]], begin_again: Callable[[], object] | None
    ) -> AsyncGenerator[pb.SampleResponse]:
        source = await asyncio.wrap_future(self._source)
        request.sampler.CopyFrom(source.message())
        deadline = time.monotonic() + self._timeout_s
        backoff, begun, deaths = Backoff(), False, 0
        while True:
            stub = SamplingServiceStub(self._connection.channel())
            left_s = max(0.01, deadline - time.monotonic())
            call: Any = stub.Sample(request, metadata=metadata, timeout=left_s)
            try:
                async for response in call:
                    begun = True
                    yield response
                return
            except grpc.aio.AioRpcError as exc:
                failure = self._connection.explain(exc, "Sample", self._timeout_s)
                # The request itself may be what the worker dies of.
                deaths += failure.reason == "WORKER_DIED"
                passing = is_passing(failure) or (failure.reason == "WORKER_DIED" and deaths < _MAX_DEATHS)
                if not passing or (begun and begin_again is None):
                    raise failure from None
                if begun and begin_again is not None:
                    begin_again()
                    begun = False
                delay_s = backoff.next_s(failure.retry_after_s)
                if time.monotonic() + delay_s >= deadline:
                    raise failure from None
            finally:
                call.cancel()  # Where the caller left; a call that is over takes no notice.
            await asyncio.sleep(delay_s)

    async def _gather(self, request: pb.SampleRequest, span: CallSpan) -> SampleResponse:
        request.message_interval_ms = _GATHERED_INTERVAL_MS
        gathered = Gathered(request)
        async with contextlib.aclosing(self._responses(request, span, gathered.clear)) as responses:
            async for response in responses:
                gathered.add(response)
        return gathered.response()

    def _iterate(self, request: pb.SampleRequest, span: CallSpan) -> Iterator[SampledToken]:
        arrived: queue.SimpleQueue[pb.SampleResponse | GradwireError | None] = queue.SimpleQueue()

        async def read() -> None:
            end: GradwireError | None = None
            try:
                async with contextlib.aclosing(self._responses(request, span)) as responses:
                    async for response in responses:
                        arrived.put(response)
            except GradwireError as exc:
                end = exc
            finally:
                arrived.put(end)

        reading = LOOP.submit(read())
        try:
            while True:
                # In a forked child nothing arrives any more.
                LOOP.refuse_if_lost()
                got = arrived.get()
                if got is None:
                    return
                if isinstance(got, GradwireError):
                    raise got
                for piece in got.samples:
                    last = len(piece.tokens) - 1
                    reason = STOP_REASONS.get(piece.stop_reason)
                    for place, (token, logprob) in enumerate(zip(piece.tokens, piece.logprobs, strict=True)):
                        yield SampledToken(piece.sample, token, logprob, reason if place == last else None)
        finally:
            if not LOOP.lost:
                reading.cancel()


def open_sampling_client(
    connection: Connection,
    *,
    model_path: str = "",
    base_model: str = "",
    retry_config: Any = None,
    record_stability_info: bool = False,
    timeout_s: float,
) -> SamplingClient:
    """A client of a sampler that the trainer has loaded; see ServiceClient.create_sampling_client."""
    refuse_given(RETRIES_ITSELF, retry_config=retry_config)
    refuse_given(NO_STABILITY_INFO, record_stability_info=record_stability_info)
    source = SamplerSource(base_model=base_model, model_path=model_path)
    _open(connection, source, timeout_s)
    return SamplingClient(connection, source)


def _open(connection: Connection, source: SamplerSource, timeout_s: float) -> str:
    """Has the trainer load a sampler, and says of which base model it is."""
    request = pb.OpenSamplerRequest(sampler=source.message())
    return connection.call(SamplingServiceStub, "OpenSampler", request, timeout_s=timeout_s).base_model


def _sampling_client(connection: Connection, source: SamplerSource, timeout_s: float) -> SamplingClient:
    return SamplingClient(connection, source, timeout_s=timeout_s, owner=False)


def _nothing(connection: Connection, source: "ConcurrentFuture[SamplerSource]") -> None:
    """In place of _let_go where the frozen weights are another client's."""


def _let_go(connection: Connection, source: "ConcurrentFuture[SamplerSource]") -> None:
    """Lets frozen weights go once they are there, without waiting: nobody is left who could be told that it failed."""
    if not LOOP.lost:
        source.add_done_callback(functools.partial(_close_sampler, connection))


def _hold_open(connection: Connection, client: "weakref.finalize", source: "ConcurrentFuture[SamplerSource]") -> None:
    """Renews the lease of frozen weights for as long as their client is there, and no longer."""
    path = _frozen_weights_path(source)
    if not path or LOOP.lost:
        return

    async def renew() -> None:
        request = pb.OpenSamplerRequest(sampler=pb.Sampler(model_path=path), lease_ms=LEASE_MS)
        while client.alive:
            # What fails is tried again; frozen weights that are gone are told to whoever samples from it.
            with contextlib.suppress(GradwireError, grpc.aio.AioRpcError, RuntimeError):
                stub = SamplingServiceStub(connection.channel())
                await stub.OpenSampler(request, metadata=connection.metadata, timeout=_CLOSE_TIMEOUT_S)
            await asyncio.sleep(LEASE_MS / 1000 / _RENEWALS_PER_LEASE)

    LOOP.submit(renew())


def _frozen_weights_path(source: "ConcurrentFuture[SamplerSource]") -> str:
    """Of frozen weights that were made; "" where none were."""
    path = "" if source.cancelled() or source.exception() else source.result().model_path
    return path if "/frozen_weights/" in path else ""


def _close_sampler(connection: Connection, source: "ConcurrentFuture[SamplerSource]") -> None:
    path = _frozen_weights_path(source)
    if not path:
        return

    async def close() -> None:
        request = pb.CloseSamplerRequest(sampler=pb.Sampler(model_path=path))
        with contextlib.suppress(GradwireError, grpc.aio.AioRpcError, asyncio.CancelledError, RuntimeError):
            stub = SamplingServiceStub(connection.channel())
            await stub.CloseSampler(request, metadata=connection.metadata, timeout=_CLOSE_TIMEOUT_S)

    LOOP.submit(close())
