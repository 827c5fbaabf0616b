"""The loop that generates: which requests go on next, and by how much.

A step is small: pieces of prompts, or one token of every sample, of one sampler. The worker runs steps between
operations of runs (worker/device_loop.py), so neither waits long for the other. Requests join and leave the batch
between steps, and owners take turns with their prompts. admission.py says who may join, decoder.py runs the model,
picking.py chooses the tokens.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Callable

from gradwire.errors import GradwireError, error, to_status
from gradwire.v1.worker_service_pb2 import WorkerDone, WorkerEvent

from trainer_service.engine.counters import Counters
from trainer_service.engine.device import Device, broken, out_of_memory
from trainer_service.engine.sampling import picking, prompts
from trainer_service.engine.sampling.admission import Admission
from trainer_service.engine.sampling.job import Job, cancelled
from trainer_service.engine.sampling.prompts import Prompts
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
_PROMPTS_SHARE = 16
"""One part in so many of the caches' room is for prompts computed lately, on top."""


class GenerationLoop:
    """Runs the requests of all samplers.

    Args:
        device: Where models are.
        counters: What is counted.
        send: Takes what is to be answered.
        max_cache_bytes: Of all requests' caches together; a request that needs more runs alone.
        torn: Whether a forward has ended that other ranks are still in.
    """

    def __init__(
        self,
        device: Device,
        counters: Counters,
        send: Callable[[WorkerEvent], object],
        *,
        max_cache_bytes: int,
        torn: Callable[[], bool] = lambda: False,
    ) -> None:
        self._torn = torn
        self._device = device
        self._counters = counters
        self._send = send
        self._admission = Admission(max_rows=_MAX_ROWS, max_cache_bytes=max_cache_bytes)
        self._prompts = Prompts(max_bytes=max_cache_bytes // _PROMPTS_SHARE)
        self._piece = _CPU_PIECE if device.torch_device.type == "cpu" else _GPU_PIECE
        self._prefilling: list[Job] = []
        self._prefill_turns: Counter[str] = Counter()
        """When each owner's prompts had their last turn."""
        self._decoding: list[Job] = []
        self._turns: deque[Sampler] = deque()
        """Samplers with jobs decoding; the first is next."""
        self._prefills = 0

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._admission)

    @property
    def num_requests(self) -> int:
        """Under way."""
        return len(self._admission)

    def uses(self, sampler: Sampler) -> bool:
        """Whether a request of it is under way."""
        return any(job.sampler is sampler for job in self._admission)

    def start(self, job: Job) -> None:
        """Takes a request in."""
        self._admission.add(job)
        self._count()

    def cancel(self, sample_id: str) -> None:
        """Gives a request up; one that is done is passed over."""
        for job in list(self._admission):
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
            batch = self._next_prompts()
            self._attempt(batch, lambda: self._prefill(batch))
        elif self._decoding:
            self._prefills = 0
            self._put_back(self._admission.make_room())
            if not self._decoding:
                return
            sampler = self._turns[0]
            self._turns.rotate(-1)
            decoded = [job for job in self._decoding if job.sampler is sampler]
            self._attempt(decoded, lambda: self._decode(sampler, decoded))
        self._counters.sampling_seconds_total += time.monotonic() - started_s

    def _admit(self) -> None:
        """Lets in whom there is room for. One whose prompt was computed lately goes on from there."""
        let_in, put_back = self._admission.admit()
        self._put_back(put_back)
        for job in let_in:
            logits_1V = None if job.wants_prompt else self._prompts.find(job)
            if logits_1V is None:
                self._prefilling.append(job)
            else:
                self._counters.shared_prompts_total += 1
                job.num_prefilled = len(job.request.prompt)
                self._begin([job], logits_1V)

    def _put_back(self, jobs: list[Job]) -> None:
        for job in jobs:
            self._leave(job)
            self._counters.requeued_samples_total += 1

    def _next_prompts(self) -> list[Job]:
        """The first request in line of the owner whose turn it is, and those of the same sampler whose next pieces fit
        beside its own. Of equal prompts one is computed, and the others go on from it."""
        equal: dict[prompts.Key, Job] = {}
        line = [
            job
            for job in self._prefilling
            if equal.setdefault(prompts.key(job), job) is job or job.wants_prompt or job.num_prefilled
        ]
        first = min(line, key=lambda job: self._prefill_turns[job.owner])
        self._prefill_turns[first.owner] = max(self._prefill_turns.values(), default=0) + 1
        room, taken = self._piece, []
        for job in [first, *(job for job in line if job is not first)]:
            size = len(self._next_piece(job))
            # One that only the whole comes out right of may be larger than a piece, and goes by itself.
            if not taken or (size <= room and job.sampler is first.sampler):
                room -= size
                taken.append(job)
        return taken

    def _next_piece(self, job: Job) -> list[int]:
        prompt = job.request.prompt
        return prompt[job.num_prefilled :][: job.sampler.decoder.piece(len(prompt), self._piece)]

    def _prefill(self, batch: list[Job]) -> None:
        pieces = [self._next_piece(job) for job in batch]
        logits = batch[0].sampler.decoder.prefill(
            [job.sequences for job in batch],
            pieces,
            num_logits=[job.num_logits(len(tokens)) for job, tokens in zip(batch, pieces, strict=True)],
        )
        for job, tokens, logits_NV in zip(batch, pieces, logits, strict=True):
            self._take_in(job, tokens, logits_NV)

    def _take_in(self, job: Job, tokens: list[int], logits_NV: picking.Tensor) -> None:
        """A piece of a prompt was computed."""
        job.num_prefilled += len(tokens)
        self._counters.prompt_tokens_total += len(tokens)
        if job.wants_prompt:
            job.add_prompt(logits_NV)
        # Behind those that wait for their turn.
        self._prefilling.remove(job)
        if not job.prefilled:
            self._prefilling.append(job)
            return
        logits_1V = logits_NV[-1:]
        self._prompts.keep(job, logits_1V)
        equal = [other for other in self._prefilling if self._may_follow(other, job)]
        for other in equal:
            other.sequences.follow(job.sequences)
            other.num_prefilled = job.num_prefilled
        self._counters.shared_prompts_total += len(equal)
        self._begin([job, *equal], logits_1V)

    def _may_follow(self, job: Job, other: Job) -> bool:
        return not job.wants_prompt and not job.num_prefilled and prompts.key(job) == prompts.key(other)

    def _begin(self, jobs: list[Job], logits_1V: picking.Tensor) -> None:
        """A prompt was taken in, or was known: the samples of all requests that begin with it follow."""
        self._attempt(jobs, lambda: self._branch(jobs, logits_1V))

    def _branch(self, jobs: list[Job], logits_1V: picking.Tensor) -> None:
        for job in jobs:
            if job in self._prefilling:
                self._prefilling.remove(job)
            job.prompt_known = True
            if not job.request.max_tokens:
                job.alive = []
                self._send_response(job)
                self._end(job, None)
                continue
            job.sampler.decoder.branch(job.sequences)
            self._decoding.append(job)
            if job.sampler not in self._turns:
                self._turns.append(job.sampler)
        if going_on := [job for job in jobs if not job.done]:
            self._choose(going_on, logits_1V.expand(sum(len(job.held) for job in going_on), -1))

    def _decode(self, sampler: Sampler, batch: list[Job]) -> None:
        tokens = [token for job in batch for token in job.feed()]
        self._choose(batch, sampler.decoder.decode([job.sequences for job in batch], tokens))

    def _choose(self, batch: list[Job], logits_NV: picking.Tensor) -> None:
        """The next token of every sample of a batch, from the logits behind the last; or the same as before."""
        rows: list[int] = []
        choosing: list[Job] = []
        place = 0
        for job in batch:
            count = len(job.held)
            if not job.repeats:
                choosing.append(job)
                rows += range(place, place + count)
            elif len(going_on := job.repeat()) < count:
                job.sequences.keep(going_on)
            place += count
        if choosing:
            self._pick(choosing, logits_NV if len(rows) == place else logits_NV[rows])

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
                if job.request.topk_sampled:
                    job.take_likeliest(logits_NV[place:stop])
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
            if broken(exc) or self._torn():
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
        self._admission.remove(job)
        self._leave(job)
        job.sequences.close()
        self._counters.sample_requests_total += 1
        self._count()
        done = WorkerDone(error=to_status(failure) if failure else None)
        self._send(WorkerEvent(command_id=job.command_id, done=done, counters=self._counters.as_metrics()))

    def _leave(self, job: Job) -> None:
        """A request does not run any more."""
        for line in (self._prefilling, self._decoding):
            if job in line:
                line.remove(job)
        if job.sampler in self._turns and not any(other.sampler is job.sampler for other in self._decoding):
            self._turns.remove(job.sampler)
        if not any(other.owner == job.owner for other in self._prefilling):
            del self._prefill_turns[job.owner]

    def _count(self) -> None:
        self._counters.sample_requests = len(self._admission)
