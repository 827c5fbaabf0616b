"""Which request goes on next, and by how much.

A step is small: pieces of prompts, or one token of every sample, of one sampler. The worker runs steps between
operations of runs (worker loop in engine/__main__.py), so neither waits long for the other. Requests join and leave the
batch between steps.
"""

import logging
import time
from collections import deque
from collections.abc import Callable

from gradwire.errors import GradwireError, error, to_status
from gradwire.v1.worker_service_pb2 import WorkerDone, WorkerEvent

from trainer_service.engine.counters import Counters
from trainer_service.engine.device import Device, broken, out_of_memory
from trainer_service.engine.sampling import picking
from trainer_service.engine.sampling.job import Job, cancelled
from trainer_service.engine.sampling.samplers import Sampler

logger = logging.getLogger(__name__)

_MAX_ROWS = 256
"""Samples decoded at once."""
_PREFILLS_PER_DECODE = 4
"""Steps with prompts between two tokens of those that are further. A fuller batch is worth some waiting."""
_CPU_PIECE, _GPU_PIECE = 256, 2048
"""Tokens of prompts at a time: well below a second's work. Where a prompt is cut depends on it alone, and so does every
number."""
_MAX_SLICE_S = 0.5
"""The most that an operation waits for sampling."""


class Scheduler:
    """Runs the requests of all samplers.

    Args:
        device: Where models are.
        counters: What is counted.
        send: Takes what is to be answered.
        max_cache_bytes: Of all requests' caches together; a request that needs more runs alone.
    """

    def __init__(
        self, device: Device, counters: Counters, send: Callable[[WorkerEvent], object], *, max_cache_bytes: int
    ) -> None:
        self._device = device
        self._counters = counters
        self._send = send
        self._max_cache_bytes = max_cache_bytes
        self._piece = _CPU_PIECE if device.torch_device.type == "cpu" else _GPU_PIECE
        self._waiting: deque[Job] = deque()
        self._prefilling: deque[Job] = deque()
        self._decoding: list[Job] = []
        self._turns: deque[Sampler] = deque()
        """Samplers with jobs decoding; the first is next."""
        self._prefills = 0

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._waiting or self._prefilling or self._decoding)

    def start(self, job: Job) -> None:
        """Takes a request in."""
        self._waiting.append(job)
        self._count()

    def cancel(self, sample_id: str) -> None:
        """Gives a request up; one that is done is passed over."""
        for job in self._jobs():
            if job.sample_id == sample_id:
                self._end(job, cancelled())

    def run_for(self, seconds: float) -> None:
        """Steps for about so long, at most _MAX_SLICE_S and at least one step."""
        stop_s = time.monotonic() + min(seconds, _MAX_SLICE_S)
        while self.busy:
            self.step()
            if time.monotonic() >= stop_s:
                break

    def step(self) -> None:
        """Pieces of prompts, or one token of all samples, of one sampler.

        Raises:
            Exception: The device is beyond use; the process must end.
        """
        started_s = time.monotonic()
        self._admit()
        if self._prefilling and (not self._decoding or self._prefills < _PREFILLS_PER_DECODE):
            self._prefills += 1
            prompts = self._next_prompts()
            self._attempt(prompts, lambda: self._prefill(prompts))
        elif self._decoding:
            self._prefills = 0
            sampler = self._turns[0]
            self._turns.rotate(-1)
            batch = [job for job in self._decoding if job.sampler is sampler]
            self._attempt(batch, lambda: self._decode(sampler, batch))
        self._counters.sampling_seconds_total += time.monotonic() - started_s

    def _admit(self) -> None:
        """Lets those wait whose caches or samples there is no room for, in the order they came."""
        while self._waiting:
            job = self._waiting[0]
            running = [*self._prefilling, *self._decoding]
            num_rows = sum(len(other.alive) for other in running)
            num_bytes = sum(map(_cache_bytes, running))
            if running and (
                num_rows + job.request.num_samples > _MAX_ROWS or num_bytes + _cache_bytes(job) > self._max_cache_bytes
            ):
                return
            self._prefilling.append(self._waiting.popleft())

    def _next_prompts(self) -> list[Job]:
        """The first request in line, and those of the same sampler whose next pieces fit beside its own."""
        room, taken = self._piece, []
        for job in list(self._prefilling):
            size = len(self._next_piece(job))
            # One that only the whole comes out right of may be larger than a piece, and goes by itself.
            if not taken or (size <= room and job.sampler is taken[0].sampler):
                room -= size
                taken.append(job)
                self._prefilling.remove(job)
        return taken

    def _next_piece(self, job: Job) -> list[int]:
        prompt = job.request.prompt
        return prompt[job.num_prefilled :][: job.sampler.decoder.piece(len(prompt), self._piece)]

    def _prefill(self, batch: list[Job]) -> None:
        pieces = [self._next_piece(job) for job in batch]
        logits = batch[0].sampler.decoder.prefill(
            [job.sequences for job in batch], pieces, all_logits=[job.request.wants_prompt for job in batch]
        )
        for job, tokens, logits_NV in zip(batch, pieces, logits, strict=True):
            self._take_in(job, tokens, logits_NV)

    def _take_in(self, job: Job, tokens: list[int], logits_NV: picking.Tensor) -> None:
        """A piece of a prompt was computed."""
        request, start = job.request, job.num_prefilled
        job.num_prefilled += len(tokens)
        self._counters.prompt_tokens_total += len(tokens)
        if request.wants_prompt and (targets := request.prompt[start + 1 : start + 1 + len(tokens)]):
            job.add_prompt(picking.place_logprobs(logits_NV[: len(targets)], targets, request.topk))
        if not job.prefilled:
            self._prefilling.append(job)
        elif not request.max_tokens:
            job.alive = []
            self._send_response(job)
            self._end(job, None)
        else:
            job.sampler.decoder.branch(job.sequences)
            self._decoding.append(job)
            if job.sampler not in self._turns:
                self._turns.append(job.sampler)
            self._pick([job], logits_NV[-1:].expand(request.num_samples, -1))

    def _decode(self, sampler: Sampler, batch: list[Job]) -> None:
        tokens = [sample.tokens[-1] for job in batch for sample in job.alive]
        self._pick(batch, sampler.decoder.decode([job.sequences for job in batch], tokens))

    def _pick(self, batch: list[Job], logits_NV: picking.Tensor) -> None:
        """The next token of every sample of a batch, from the logits behind the last."""
        samples = [sample for job in batch for sample in job.alive]
        choices = [job.request.choice for job in batch for _ in job.alive]
        uniforms = [sample.random.random() for sample in samples]
        tokens, logprobs = picking.pick(logits_NV, choices, uniforms)
        self._counters.sampled_tokens_total += len(tokens)
        place = 0
        for job in batch:
            stop = place + len(job.alive)
            try:
                going_on = job.take(tokens[place:stop], logprobs[place:stop])
            except GradwireError as exc:
                self._end(job, exc)
            else:
                self._send_response(job)
                if not going_on:
                    self._end(job, None)
                elif len(going_on) < stop - place:
                    job.sequences.keep(going_on)
            place = stop

    def _attempt(self, batch: list[Job], work: Callable[[], None]) -> None:
        """Does a step's work. What goes wrong ends the requests it was for, and no others."""
        gone = batch[0].sampler.gone
        try:
            if gone is not None:
                raise gone
            work()
            return
        except GradwireError as exc:
            failure = exc
        except Exception as exc:
            if broken(exc):
                raise
            if out_of_memory(exc):
                logger.warning("Out of memory.", extra={"fields": {"what": "sampling", "requests": len(batch)}})
                failure = error(
                    "DEVICE_OUT_OF_MEMORY",
                    f"{self._device.name} has no memory left to sample {len(batch)} requests at once. Ask for fewer "
                    "samples or tokens, or close samplers and delete runs that are done.",
                    device=self._device.name,
                )
            else:
                logger.exception("Sampling failed.")
                text = "Sampling failed in the worker by a fault of Gradwire's own; its log has the details."
                failure = error("INTERNAL", text)
        for job in batch:
            self._end(job, failure)
        self._device.release_cached_memory()

    def _send_response(self, job: Job) -> None:
        response = job.response()
        if response is not None:
            self._send(WorkerEvent(command_id=job.command_id, sampled=response))

    def _end(self, job: Job, failure: GradwireError | None) -> None:
        if job.done:
            return  # Before what went wrong for others of its batch.
        job.done = True
        for line in (self._waiting, self._prefilling, self._decoding):
            if job in line:
                line.remove(job)
        job.sequences.close()
        if job.sampler in self._turns and not any(other.sampler is job.sampler for other in self._decoding):
            self._turns.remove(job.sampler)
        self._counters.sample_requests_total += 1
        self._count()
        done = WorkerDone(error=to_status(failure) if failure else None)
        self._send(WorkerEvent(command_id=job.command_id, done=done, counters=self._counters.as_metrics()))

    def _jobs(self) -> list[Job]:
        return [*self._waiting, *self._prefilling, *self._decoding]

    def _count(self) -> None:
        self._counters.sample_requests = len(self._jobs())


def _cache_bytes(job: Job) -> int:
    shape = job.sampler.decoder.shape
    return 0 if shape is None else job.num_cached_tokens * shape.bytes_per_token
