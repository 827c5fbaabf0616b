"""Turns between requests, room, cancelling, and samplers that stay frozen: on a tiny model, in this process."""

import gc
import json
import time
from pathlib import Path

import pytest
import torch
from gradwire.errors import GradwireError, from_status
from gradwire.types import AdamParams
from gradwire.v1 import sampling_service_pb2 as pb
from gradwire.v1.worker_service_pb2 import WorkerEvent, WorkerSample

from tests.engines import RUN, forward_backward, make_engine
from tests.tiny import make_tiny_llama
from trainer_service.engine.engine import Engine
from trainer_service.engine.models.lora import LoraSettings
from trainer_service.engine.sampling import decoder as decoder_module
from trainer_service.engine.sampling import generation_loop as generation_loop_module
from trainer_service.engine.sampling import samplers as samplers_module
from trainer_service.engine.sampling import trial
from trainer_service.engine.sampling.forwards import Forwards
from trainer_service.engine.sampling.service import Sampling


class Worker:
    """An engine with a run, and sampling beside it."""

    def __init__(self, model: Path, folder: Path) -> None:
        self.engine: Engine = make_engine(model, folder)
        self.events: list[WorkerEvent] = []
        self.sampling = Sampling(self.engine, checkpoint_dir=folder, send=self.events.append)
        self.generation = self.sampling.generation
        self.last = 0

    def start(
        self,
        *,
        max_tokens: int = 8,
        path: str = "",
        prompt: tuple[int, ...] = (5, 6, 7),
        num_samples: int = 1,
        owner: str = "",
        logprobs: bool = False,
        interval_ms: int = 0,
    ) -> int:
        """Begins a greedy request; returns its command_id."""
        self.last += 1
        stop = pb.Stop()
        params = pb.SamplingParams(max_tokens=max_tokens, temperature=0.0, stop=stop)
        sampler = pb.Sampler(model_path=path)
        request = pb.SampleRequest(sampling_params=params, sampler=sampler, num_samples=num_samples)
        request.include_prompt_logprobs = logprobs
        request.message_interval_ms = interval_ms
        request.prompt.tokens.extend(prompt)
        command = WorkerSample(sample_id=str(self.last), request=request, owner=owner)
        self.sampling.start(self.last, command, self.sampling.read(request))
        return self.last

    def finish(self) -> None:
        while self.generation.busy:
            self.generation.step()

    def tokens(self, command_id: int) -> list[int]:
        """Of the first sample, as far as they were sent."""
        found = []
        for event in self.events:
            if event.command_id == command_id:
                found += [token for piece in event.sampled.samples if not piece.sample for token in piece.tokens]
        return found

    def messages(self, command_id: int) -> list[pb.SampleResponse]:
        """With tokens, in the order they were sent."""
        return [event.sampled for event in self.events if event.command_id == command_id and event.sampled.samples]

    def failure(self, command_id: int) -> GradwireError | None:
        """What a request ended with."""
        (done,) = (event.done for event in self.events if event.command_id == command_id and event.HasField("done"))
        return from_status(done.error) if done.HasField("error") else None

    def train(self) -> None:
        forward_backward(self.engine)
        self.engine.optim_step(RUN, 2, AdamParams(learning_rate=0.1))


@pytest.fixture
def worker(tiny_llama: Path, tmp_path: Path) -> Worker:
    return Worker(tiny_llama, tmp_path)


def test_a_request_that_comes_later_is_decoded_beside_those_under_way(worker: Worker):
    first = worker.start(max_tokens=30)
    for _ in range(5):
        worker.generation.step()
    second = worker.start(max_tokens=3)
    for _ in range(4):
        worker.generation.step()
    assert worker.failure(second) is None
    assert len(worker.tokens(second)) == 3
    assert worker.generation.busy
    worker.finish()
    assert len(worker.tokens(first)) == 30
    assert worker.engine.counters.sample_requests_total == 2


def test_tokens_of_a_request_that_nobody_reads_along_come_together(worker: Worker):
    whole = worker.start(max_tokens=30, num_samples=2, interval_ms=10_000)
    read_along = worker.start(max_tokens=30, num_samples=2, interval_ms=1)
    while worker.generation.busy:
        worker.generation.step()
        time.sleep(0.002)
    assert worker.tokens(whole) == worker.tokens(read_along)
    # The first tokens, at once, and the rest.
    assert [len(message.samples[0].tokens) for message in worker.messages(whole)] == [1, 29]
    assert len(worker.messages(read_along)) == 30


def test_prompts_do_not_keep_those_who_decode_waiting_for_long(worker: Worker, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(generation_loop_module, "_PREFILLS_PER_DECODE", 2)
    monkeypatch.setattr(worker.generation, "_piece", 5)
    first = worker.start(max_tokens=20)
    worker.generation.step()
    for number in range(12):
        worker.start(max_tokens=1, prompt=(5, 6, 20 + number))
    counters = worker.engine.counters
    before = counters.sampled_tokens_total
    for _ in range(9):
        worker.generation.step()
    # Three times two prompts, whose one token each comes with them, and three tokens of the first request.
    assert counters.sampled_tokens_total - before == 9
    worker.finish()
    assert len(worker.tokens(first)) == 20


def test_prompts_of_one_sampler_are_taken_in_together_as_far_as_a_step_goes(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(worker.generation, "_piece", 8)
    for number in range(4):
        worker.start(max_tokens=1, prompt=(20 + number, 6, 7)[: 3 - number % 2])
    counters = worker.engine.counters
    steps = []
    while worker.generation.busy:
        worker.generation.step()
        steps.append(counters.prompt_tokens_total)
    assert steps == [8, 10]


def test_a_long_prompt_is_taken_in_by_pieces_between_which_others_go_on(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(worker.generation, "_piece", 4)
    long = worker.start(max_tokens=2, prompt=tuple(range(10, 50)))
    short = worker.start(max_tokens=1)
    for _ in range(3):
        worker.generation.step()
    assert worker.tokens(short)
    assert not worker.tokens(long)
    worker.finish()
    assert len(worker.tokens(long)) == 2


def test_two_samplers_take_turns(worker: Worker):
    path = str(worker.sampling.samplers.freeze(RUN, 1))
    requests = [worker.start(max_tokens=10), worker.start(max_tokens=10, path=path)]
    for _ in range(2 + 2 * 9):
        worker.generation.step()
    assert not worker.generation.busy
    assert [len(worker.tokens(request)) for request in requests] == [10, 10]


def test_requests_that_find_no_room_wait_their_turn_and_one_too_large_runs_alone(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(worker.generation._admission, "max_cache_bytes", 1)
    requests = [worker.start(max_tokens=4) for _ in range(3)]
    for _ in range(4):
        worker.generation.step()
    assert [len(worker.tokens(request)) for request in requests] == [4, 0, 0]
    worker.finish()
    assert [len(worker.tokens(request)) for request in requests] == [4, 4, 4]


def test_behind_one_owners_long_samples_and_prompts_anothers_first_token_comes_in_a_few_steps(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(worker.generation, "_piece", 8)
    long = [
        worker.start(max_tokens=12, prompt=(number % 90 + 30, *range(5, 55)), num_samples=4, owner="alice")
        for number in range(90)
    ]
    for _ in range(30):
        worker.generation.step()
    quick = worker.start(max_tokens=2, owner="bob")
    for _ in range(10):
        worker.generation.step()
    assert len(worker.tokens(quick)) == 2
    assert sum(bool(worker.tokens(request)) for request in long) < len(long) // 2


@pytest.mark.parametrize("asks_first", [True, False])
def test_a_request_that_asks_about_its_prompt_computes_it_and_others_may_go_on_from_there(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, asks_first: bool
):
    monkeypatch.setattr(worker.generation, "_piece", 4)
    asks = [worker.start(logprobs=asks_first), worker.start(logprobs=not asks_first), worker.start()]
    worker.finish()
    assert [worker.failure(request) for request in asks] == [None] * 3
    assert len({tuple(worker.tokens(request)) for request in asks}) == 1
    assert worker.engine.counters.prompt_tokens_total == 3 * (1 if asks_first else 2)


def test_a_prompt_is_not_shared_between_owners_nor_kept_when_its_sampler_is_gone(worker: Worker):
    counters = worker.engine.counters
    for owner in ("alice", "alice", "bob"):
        worker.start(owner=owner)
        worker.finish()
    assert (counters.prompt_tokens_total, counters.shared_prompts_total) == (6, 1)
    path = str(worker.sampling.samplers.freeze(RUN, 1))
    worker.start(path=path)
    worker.finish()
    kept = worker.generation._prompts._kept
    assert len(kept) == 3
    worker.sampling.samplers.close(path)
    gc.collect()
    assert len(kept) == 2


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_a_cancelled_request_ends_at_once_and_frees_its_room(
    worker: Worker, monkeypatch: pytest.MonkeyPatch, steps: int
):
    monkeypatch.setattr(worker.generation._admission, "max_rows", 8)
    given_up = worker.start(max_tokens=50, num_samples=8)
    waiting = worker.start(max_tokens=4)
    for _ in range(steps):
        worker.generation.step()
    worker.generation.cancel(str(given_up))
    worker.generation.cancel("nobody's")
    failure = worker.failure(given_up)
    assert failure is not None
    assert failure.reason == "CANCELLED"
    worker.finish()
    assert len(worker.tokens(waiting)) == 4


def test_a_slice_is_bounded_and_makes_at_least_one_step(worker: Worker, monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(generation_loop_module.time, "monotonic", lambda: now[0])
    step = worker.generation.step

    def slow_step() -> None:
        step()
        now[0] += 0.2

    monkeypatch.setattr(worker.generation, "step", slow_step)
    worker.start(max_tokens=50)
    for asked, took in ((0.0, 0.2), (0.3, 0.4), (60.0, 0.6)):
        before = now[0]
        worker.generation.run_for(asked)
        assert now[0] - before == pytest.approx(took)


def test_frozen_weights_copy_nothing_until_the_run_trains_and_stay_as_they_were(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
):
    live = worker.engine.live_model(RUN)
    path = worker.sampling.samplers.freeze(RUN, 1)
    sampler = worker.sampling.samplers.find(str(path))
    assert sampler.decoder.model is live
    before = worker.start(path=str(path))
    worker.finish()
    half_way = worker.start(path=str(path), max_tokens=8)
    for _ in range(4):
        worker.generation.step()
    worker.train()
    assert sampler.decoder.model is not live
    worker.finish()
    after = worker.start(path=str(path))
    worker.finish()
    assert worker.tokens(before) == worker.tokens(half_way) == worker.tokens(after)


def test_frozen_weights_that_are_wanted_make_no_room_for_others(worker: Worker, monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr(samplers_module.time, "monotonic", lambda: now[0])
    samplers = worker.sampling.samplers
    leased = str(samplers.freeze(RUN, 1, lease_s=60))
    used, idle, last = (str(samplers.freeze(RUN, seq_id)) for seq_id in (2, 3, 4))
    request = worker.start(path=used, max_tokens=50)
    samplers.freeze(RUN, 5)
    with pytest.raises(GradwireError, match="made room for a newer one"):
        samplers.find(idle)
    samplers.find(last).lease(30)
    samplers.find(f"gradwire://{RUN}/frozen_weights/5").lease(30)
    with pytest.raises(GradwireError, match="4 sets of frozen weights that clients hold open") as refused:
        samplers.freeze(RUN, 6)
    assert (refused.value.reason, refused.value.metadata["limit"]) == ("LIMIT_EXCEEDED", "4")
    worker.finish()
    samplers.find(leased)
    assert worker.failure(request) is None
    # Nobody samples any more, so one goes; with its lease over, the first is like others.
    samplers.freeze(RUN, 6, lease_s=60)
    with pytest.raises(GradwireError, match="made room"):
        samplers.find(used)
    now[0] += 61
    samplers.freeze(RUN, 7)
    with pytest.raises(GradwireError, match="made room"):
        samplers.find(last)


def test_a_sampler_let_go_while_it_generates_stays_frozen_to_the_end(worker: Worker):
    path = str(worker.sampling.samplers.freeze(RUN, 1))
    wanted = worker.start(path=path, max_tokens=12)
    worker.finish()
    under_way = worker.start(path=path, max_tokens=12)
    for _ in range(3):
        worker.generation.step()
    worker.sampling.samplers.close(path)
    worker.train()
    worker.finish()
    assert worker.tokens(under_way) == worker.tokens(wanted)


def test_where_no_memory_is_left_for_a_copy_training_goes_on_and_the_sampler_goes(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
):
    def no_memory(model: object) -> object:
        raise torch.OutOfMemoryError("no memory")

    path = str(worker.sampling.samplers.freeze(RUN, 1))
    under_way = worker.start(path=path, max_tokens=12)
    worker.generation.step()
    monkeypatch.setattr(samplers_module, "frozen_copy", no_memory)
    worker.train()
    worker.finish()
    failure = worker.failure(under_way)
    assert failure is not None
    assert failure.reason == "DEVICE_OUT_OF_MEMORY"
    with pytest.raises(GradwireError, match="no memory left for a copy"):
        worker.start(path=path)


def test_what_fails_in_a_step_ends_its_requests_and_no_others(worker: Worker, monkeypatch: pytest.MonkeyPatch):
    worker.sampling.samplers.find("")
    worker.train()
    path = str(worker.sampling.samplers.freeze(RUN, 3))
    good, bad = worker.start(max_tokens=6), worker.start(max_tokens=6, path=path)
    for _ in range(4):
        worker.generation.step()
    with torch.no_grad():
        next(worker.engine.live_model(RUN).parameters()).fill_(float("nan"))
    worker.finish()
    failure = worker.failure(bad)
    assert failure is not None
    assert failure.reason == "NON_FINITE"
    assert worker.failure(good) is None
    assert len(worker.tokens(good)) == 6


def test_a_forward_that_other_ranks_are_still_in_ends_the_process(worker: Worker, monkeypatch: pytest.MonkeyPatch):
    def failing(decoder: decoder_module.Decoder, *args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(decoder_module.Decoder, "prefill", failing)
    monkeypatch.setattr(worker.generation, "_torn", lambda: True)
    worker.start()
    with pytest.raises(torch.OutOfMemoryError):
        worker.generation.step()


def test_a_request_that_ended_before_another_of_its_batch_failed_is_answered_once(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
):
    branch = decoder_module.Decoder.branch

    def failing(decoder: decoder_module.Decoder, sequences: decoder_module.Sequences) -> None:
        if sequences.num_samples == 2:
            raise RuntimeError("something unforeseen")
        branch(decoder, sequences)

    monkeypatch.setattr(decoder_module.Decoder, "branch", failing)
    ended, failed = worker.start(max_tokens=1), worker.start(num_samples=2, prompt=(5, 6, 8))
    worker.finish()
    assert worker.failure(ended) is None
    assert len(worker.tokens(ended)) == 1
    failure = worker.failure(failed)
    assert failure is not None
    assert failure.reason == "INTERNAL"


def test_a_model_that_cannot_be_decoded_together_is_decoded_the_next_best_way(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    together = Worker(tiny_llama, tmp_path / "together")
    wanted = together.start(max_tokens=12, num_samples=2)
    together.finish()
    assert together.sampling.decoding.described == "together"

    def refuse(*_: object) -> object:
        raise NotImplementedError("attention of its own")

    again = "every token computes all before it again: it has no cache that its forward takes"
    for number, (breaks, described) in enumerate(
        (
            (lambda: monkeypatch.setattr(Forwards, "find_shape", refuse), "together, a row each: it has attention"),
            (
                lambda: monkeypatch.setattr(Forwards, "find_row_shape", refuse),
                "one by one: it has attention",
            ),
            (lambda: monkeypatch.setattr(trial, "_CACHE_ARGUMENTS", ()), f"together, {again}"),
            (lambda: monkeypatch.setattr(Forwards, "again", refuse), again),
        )
    ):
        breaks()
        other = Worker(tiny_llama, tmp_path / f"other{number}")
        got = other.start(max_tokens=12, num_samples=2)
        other.finish()
        assert other.sampling.decoding.described.startswith(described)
        assert other.tokens(got) == together.tokens(wanted)


def test_another_models_checkpoint_is_refused_saying_whose_it_is(tiny_llama: Path, tmp_path: Path):
    worker = Worker(make_tiny_llama(tmp_path / "untied", tied=False), tmp_path)
    saved = make_engine(tiny_llama, tmp_path)
    saved.save_weights_for_sampler(RUN, "tied")
    saved.create_run("lora", lora=LoraSettings(rank=2, alpha=32.0, seed=0))
    saved.save_weights_for_sampler("lora", "adapter")
    (folder,) = tmp_path.glob("*/sampler_weights/adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 3}))
    worker.engine.save_weights_for_sampler(RUN, "foreign")
    manifest = tmp_path / RUN / "sampler_weights" / "foreign" / "manifest.json"
    manifest.write_text(manifest.read_text().replace("LlamaForCausalLM", "GPT2LMHeadModel"))
    for run_id, name, why in (
        (RUN, "tied", "is of a model with other parameters"),
        ("lora", "adapter", "names an adapter that "),
        (RUN, "foreign", "is of a GPT2LMHeadModel, and this trainer serves a LlamaForCausalLM"),
    ):
        with pytest.raises(GradwireError) as caught:
            worker.start(path=f"gradwire://{run_id}/sampler_weights/{name}")
        assert caught.value.reason == "CHECKPOINT_MISMATCH"
        assert f'The checkpoint "{name}" {why}' in caught.value.message
    worker.start()
    worker.finish()
