"""The client of one sampler: frozen parameters that generate."""

import asyncio
import contextlib
import functools
import queue
import time
import uuid
import weakref
from collections import defaultdict
from collections.abc import AsyncGenerator, Generator, Iterator
from concurrent.futures import Future as ConcurrentFuture
from dataclasses import dataclass
from typing import Any

import grpc.aio

from gradwire._client.async_twins import awaited, off_thread
from gradwire._client.loop import LOOP
from gradwire._client.ported_names import RefusesTinkerNames, refuse_given
from gradwire._client.sampling_params import MAX_UINT32, checked_integer, sampling_params_message, shown
from gradwire._client.tokenizer_client import load_tokenizer
from gradwire._client.transport import Connection, is_passing
from gradwire.errors import GradwireError, OperationCancelledError, invalid_field
from gradwire.futures import APIFuture
from gradwire.types import SampledSequence, SampledToken, SampleResponse, SamplingParams
from gradwire.types.data import model_input_tokens
from gradwire.types.sampling_results import StopReason
from gradwire.v1 import sampling_service_pb2 as pb
from gradwire.v1.datum_pb2 import ModelInput
from gradwire.v1.sampling_service_pb2_grpc import SamplingServiceStub

_STOP_REASONS: dict[int, StopReason] = {pb.STOP_REASON_LENGTH: "length", pb.STOP_REASON_STOP: "stop"}
_CLOSE_TIMEOUT_S = 10.0

RETRIES_ITSELF = "calls are tried again by themselves until they time out."
NO_STABILITY_INFO = "there is no loss that reads it."
_PROMPTS_LOGPROBS = "of a prompt there are include_prompt_logprobs and topk_prompt_logprobs, for all of its tokens."


@dataclass(frozen=True)
class SamplerSource:
    """What names a sampler to the trainer; model_path "" is the base model."""

    base_model: str = ""
    model_path: str = ""

    def message(self) -> pb.Sampler:
        """The same for the wire."""
        return pb.Sampler(model_path=self.model_path) if self.model_path else pb.Sampler(base_model=self.base_model)


class SamplingClient(RefusesTinkerNames):
    """Generates from the base model, a checkpoint, or a snapshot. Made by ServiceClient and TrainingClient.

    Calls return futures at once; make many, and the trainer works on them together. It samples from frozen
    parameters: later optimizer steps do not change it. Usable from any thread.

    Logprobs are natural log and those of the model's own distribution, as forward of the same parameters computes them:
    temperature, top_k and top_p affect which tokens are chosen, not the logprobs. A loss that weighs by probabilities
    (importance_sampling, ppo) therefore takes them as they are from samples drawn at temperature 1 with neither top_k
    nor top_p; from others it corrects for the model's distribution, not for the narrower one they were drawn from.

    It can be pickled once its sampler exists (pickling waits for that): the copy in another process has a connection of
    its own to the same sampler. A snapshot lives as long as the client it was made with, so keep that client. The key
    goes along only in the arguments of a process that multiprocessing starts ("spawn" or "forkserver"), over its
    private pipe; no other pickle holds it, and the process that unpickles one reads GRADWIRE_API_KEY.

    Args:
        connection: To the trainer.
        source: Names the sampler, now or once an operation has been answered.
        timeout_s: Longest that one call may take, seconds.
        owner: Whether a snapshot ends with this client.
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
        # At exit the loop is stopped; the snapshot goes with its run.
        self._finalizer.atexit = False

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
        """Continues a prompt. Cancelling the future frees its place on the trainer.

        Args:
            prompt: ModelInput, ours or tinker's, or token ids.
            num_samples: Samples, whose prompt is computed once.
            sampling_params: SamplingParams, ours or tinker's; None takes the defaults.
            include_prompt_logprobs: Also return the logprobs of the prompt's tokens.
            topk_prompt_logprobs: Also return this many likeliest tokens at each position of the prompt.
            topk_sample_logprobs: Must be 0; like the arguments below, it exists in tinker only.
            target_prompt_logprobs: Must be None.
            prompt_alt_tokens_k: Must be 0.
            prompt_logprobs_last_n: Must be None.

        Raises:
            InvalidArgumentError: An argument that cannot be sent. Errors found by the trainer come through the future.
        """
        refuse_given(
            _PROMPTS_LOGPROBS,
            target_prompt_logprobs=target_prompt_logprobs,
            prompt_alt_tokens_k=prompt_alt_tokens_k,
            prompt_logprobs_last_n=prompt_logprobs_last_n,
        )
        refuse_given("samples come with the logprobs of their own tokens.", topk_sample_logprobs=topk_sample_logprobs)
        request = self._request(prompt, num_samples, sampling_params, include_prompt_logprobs, topk_prompt_logprobs)
        return APIFuture(LOOP.submit(self._gather(request)), "sample")

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
        return self._iterate(request)

    def compute_logprobs(self, prompt: Any, prompt_logprobs_last_n: int | None = None) -> APIFuture[list[float | None]]:
        """The logprob of every token of a prompt given those before it, natural log; None for the first.

        Args:
            prompt: As in `sample`.
            prompt_logprobs_last_n: Must be None.
        """
        refuse_given(_PROMPTS_LOGPROBS, prompt_logprobs_last_n=prompt_logprobs_last_n)
        request = self._request(prompt, 1, SamplingParams(max_tokens=0), include_prompt_logprobs=True)

        async def compute() -> list[float | None]:
            return (await self._gather(request)).prompt_logprobs or [None]

        return APIFuture(LOOP.submit(compute()), "compute_logprobs")

    # ── about the sampler ─────────────────────────────────────────────────────────────────────────────────────────

    @property
    def model_path(self) -> str:
        """gradwire:// path of the checkpoint or snapshot, "" for the base model; waits for a snapshot to be made."""
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
        """The base model, as the trainer was given it; asks the trainer."""
        source = APIFuture(self._source, "the sampler").result(timeout_s)
        return _open(self._connection, source, timeout_s)

    sample_async = awaited(sample)
    compute_logprobs_async = awaited(compute_logprobs)
    get_base_model_async = off_thread(get_base_model)
    get_tokenizer_async = off_thread(get_tokenizer)

    def close(self) -> None:
        """Frees a snapshot on the trainer. A client that is garbage-collected does the same."""
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

    def _request(
        self,
        prompt: Any,
        num_samples: int,
        sampling_params: Any,
        include_prompt_logprobs: bool = False,
        topk_prompt_logprobs: int = 0,
    ) -> pb.SampleRequest:
        if not self._finalizer.alive:
            raise OperationCancelledError("This SamplingClient is closed; make a new one.", reason="CANCELLED")
        num_samples = checked_integer("num_samples", num_samples, 1, MAX_UINT32)
        topk_prompt_logprobs = checked_integer("topk_prompt_logprobs", topk_prompt_logprobs, 0, MAX_UINT32)
        if not isinstance(include_prompt_logprobs, bool):
            raise invalid_field(
                "include_prompt_logprobs", f"is {shown(include_prompt_logprobs)}; it must be True or False."
            )
        try:
            tokens = model_input_tokens(prompt, "prompt")
            message = ModelInput(tokens=tokens)
        except ValueError as exc:
            raise invalid_field("prompt", f"cannot be read: {exc}") from exc
        return pb.SampleRequest(
            prompt=message,
            num_samples=num_samples,
            sampling_params=sampling_params_message(SamplingParams() if sampling_params is None else sampling_params),
            include_prompt_logprobs=include_prompt_logprobs,
            topk_prompt_logprobs=topk_prompt_logprobs,
        )

    async def _responses(self, request: pb.SampleRequest) -> AsyncGenerator[pb.SampleResponse]:
        """The trainer's messages. Until the first one, the call is retried while the trainer is away or starting."""
        source = await asyncio.wrap_future(self._source)
        request.sampler.CopyFrom(source.message())
        deadline = time.monotonic() + self._timeout_s
        delay_s, begun = 0.1, False
        while True:
            stub = SamplingServiceStub(self._connection.channel())
            left_s = max(0.01, deadline - time.monotonic())
            call: Any = stub.Sample(request, metadata=self._connection.metadata, timeout=left_s)
            try:
                async for response in call:
                    begun = True
                    yield response
                return
            except grpc.aio.AioRpcError as exc:
                failure = self._connection.explain(exc, "Sample", self._timeout_s)
                if begun or not is_passing(failure):
                    raise failure from None
                delay_s = failure.retry_after_s or min(2.0, delay_s * 2)
                if time.monotonic() + delay_s >= deadline:
                    raise failure from None
            finally:
                call.cancel()  # Where the caller left; a call that is over takes no notice.
            await asyncio.sleep(delay_s)

    async def _gather(self, request: pb.SampleRequest) -> SampleResponse:
        # By sample, as they come: how many is for the trainer to check before anything of that length is made here.
        tokens: defaultdict[int, list[int]] = defaultdict(list)
        logprobs: defaultdict[int, list[float]] = defaultdict(list)
        reasons: dict[int, StopReason] = {}
        prompt = None
        async with contextlib.aclosing(self._responses(request)) as responses:
            async for response in responses:
                if response.HasField("prompt"):
                    prompt = response.prompt
                for piece in response.samples:
                    tokens[piece.sample].extend(piece.tokens)
                    logprobs[piece.sample].extend(piece.logprobs)
                    reasons[piece.sample] = _STOP_REASONS.get(piece.stop_reason, "length")
        sample_id = uuid.uuid4().hex
        sequences = [
            SampledSequence(
                tokens[number], logprobs[number], reasons.get(number, "length"), sequence_id=f"{sample_id}-{number}"
            )
            for number in range(request.num_samples)
        ]
        if prompt is None:
            return SampleResponse(sequences)
        prompt_logprobs = [None, *prompt.logprobs] if request.include_prompt_logprobs else None
        return SampleResponse(sequences, prompt_logprobs, _topk(prompt) if prompt.topk else None)

    def _iterate(self, request: pb.SampleRequest) -> Iterator[SampledToken]:
        arrived: queue.SimpleQueue[pb.SampleResponse | GradwireError | None] = queue.SimpleQueue()

        async def read() -> None:
            end: GradwireError | None = None
            try:
                async with contextlib.aclosing(self._responses(request)) as responses:
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
                    reason = _STOP_REASONS.get(piece.stop_reason)
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


def _topk(prompt: pb.PromptLogprobs) -> list[list[tuple[int, float]] | None]:
    count = prompt.topk
    pairs = list(zip(prompt.topk_tokens, prompt.topk_logprobs, strict=True))
    return [None, *(pairs[start : start + count] for start in range(0, len(pairs), count))]


def _sampling_client(connection: Connection, source: SamplerSource, timeout_s: float) -> SamplingClient:
    return SamplingClient(connection, source, timeout_s=timeout_s, owner=False)


def _nothing(connection: Connection, source: "ConcurrentFuture[SamplerSource]") -> None:
    """In place of _let_go where the snapshot is another client's."""


def _let_go(connection: Connection, source: "ConcurrentFuture[SamplerSource]") -> None:
    """Lets a snapshot go once it is there, without waiting: nobody is left who could be told that it failed."""
    if not LOOP.lost:
        source.add_done_callback(functools.partial(_close_sampler, connection))


def _close_sampler(connection: Connection, source: "ConcurrentFuture[SamplerSource]") -> None:
    path = "" if source.cancelled() or source.exception() else source.result().model_path
    if "/snapshots/" not in path:
        return

    async def close() -> None:
        request = pb.CloseSamplerRequest(sampler=pb.Sampler(model_path=path))
        with contextlib.suppress(GradwireError, grpc.aio.AioRpcError, asyncio.CancelledError, RuntimeError):
            stub = SamplingServiceStub(connection.channel())
            await stub.CloseSampler(request, metadata=connection.metadata, timeout=_CLOSE_TIMEOUT_S)

    LOOP.submit(close())
