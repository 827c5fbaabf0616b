"""What ranks of tests.rank_pool run: each takes its Ranks first. On one rank they run in the test's own process."""

import functools
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradwire._wire.codec import Batch
from gradwire.errors import GradwireError
from gradwire.types import AdamParams
from gradwire.v1.datum_pb2 import ModelInput
from gradwire.v1.sampling_service_pb2 import Sampler, SampleRequest, SamplingParams
from gradwire.v1.worker_service_pb2 import WorkerEvent, WorkerSample
from transformers import AutoConfig

from tests.engines import BATCH, CPU, RUN
from tests.rank_pool import garbage_among_all
from trainer_service.engine.device import Device
from trainer_service.engine.engine import Engine
from trainer_service.engine.losses import find_loss
from trainer_service.engine.models import source, streamed_export
from trainer_service.engine.models.lora import LoraSettings
from trainer_service.engine.models.quantized import held_bytes
from trainer_service.engine.packed.logprobs import Head, LowRank, linear_logprobs
from trainer_service.engine.packed.vocabulary import VocabularyPart
from trainer_service.engine.parallel.gloo_collectives import Gather, SumInOrder
from trainer_service.engine.parallel.sharding import record_of, reshard, whole_parameter
from trainer_service.engine.parallel.tensor_parallel import cut_of
from trainer_service.engine.rank_channels import Ranks
from trainer_service.engine.sampling.service import Sampling
from trainer_service.engine.storage.snapshots import SnapshotWriter
from trainer_service.engine.tensor_files import read_tensors
from trainer_service.worker_config import EngineSettings

PARAMS = AdamParams(learning_rate=1e-2, grad_clip_norm=1.0)


def make_engine(
    ranks: Ranks, folder: Path, checkpoint_dir: Path, *, lora: bool = False, unembed: bool = False, **settings: Any
) -> Engine:
    """An engine with one run, `RUN`; with lora, and unembed for the head too, that of an adapter."""
    asked = EngineSettings(**settings)
    device = CPU if asked.compute_dtype != "bfloat16" else Device(torch.device("cpu"), "cpu", torch.bfloat16)
    engine = Engine(str(folder), device=device, checkpoint_dir=checkpoint_dir, settings=asked, ranks=ranks)
    engine.create_run(RUN, lora=LoraSettings(rank=4, train_unembed=unembed) if lora else None)
    return engine


def tensors(engine: Engine) -> dict[str, np.ndarray[Any, Any]]:
    """The run's parameters that train, whole."""
    run = engine.run_state(RUN)
    reshard(run.model)
    return {name: whole_parameter(p).numpy().copy() for name, p in run.trained_parameters().items()}


def gradients(engine: Engine) -> dict[str, np.ndarray[Any, Any]]:
    """The run's gradients, whole and summed over ranks."""
    run, found = engine.run_state(RUN), {}
    for name, parameter in run.trained_parameters().items():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        total = whole_parameter(grad, like=parameter).clone()
        if run.lora_rank and engine.ranks.world_size > 1:
            torch.distributed.all_reduce(total)
            cut = cut_of(parameter)
            if cut is not None and not cut.summand:
                # Each rank of a group came to the same.
                total /= cut.group.size
        found[name] = total.numpy().copy()
    return found


def train(
    ranks: Ranks,
    folder: Path,
    checkpoint_dir: Path,
    batches: Sequence[Batch],
    *,
    lora: bool = False,
    loss: str = "cross_entropy",
    custom: bool = False,
    params: AdamParams = PARAMS,
    **settings: Any,
) -> dict[str, Any]:
    """Three steps, each over all batches. Of the first the logprobs and gradients, of all metrics and parameters.

    Custom losses are all held before their backwards, which go in another order.
    """
    engine = make_engine(ranks, folder, checkpoint_dir, lora=lora, **settings)
    found: dict[str, Any] = {"sharded": record_of(engine.run_state(RUN).model) is not None, "metrics": []}
    found["before"] = tensors(engine)
    seq_id = 0
    for step in range(3):
        logprobs: list[Any] = []
        held: list[tuple[int, Batch]] = []
        for batch in batches:
            seq_id += 1
            if custom:
                result = engine.forward(RUN, seq_id, engine.stage(batch), keep_graph=True)
                held.append((seq_id, batch))
            else:
                result = engine.forward_backward(RUN, seq_id, engine.stage(batch, find_loss(loss)))
                found["metrics"].append(result.metrics)
            logprobs.append(result.logprobs_TK)
        for forward_seq_id, batch in reversed(held):
            seq_id += 1
            weights = -batch.loss_fn_inputs["weights"]
            found["metrics"].append(
                engine.backward(RUN, seq_id, forward_seq_id=forward_seq_id, gradients_TK=weights.astype(np.float32))
            )
        # An evaluation between backward and step.
        engine.forward(RUN, seq_id + 1, engine.stage(batches[0]))
        if step == 0:
            found["logprobs"], found["gradients"] = logprobs, gradients(engine)
        seq_id += 2
        found["metrics"].append(engine.optim_step(RUN, seq_id, params).metrics)
    found["after"] = tensors(engine)
    found["recomputed"] = engine.counters.recomputed_graphs_total
    return found


def answer(ranks: Ranks, *, columns: int, low_rank: int, **head: Any) -> dict[str, float]:
    """How far what a head answers whose vocabulary ranks divide is from what a whole one does: logprobs, and gradients
    relative to their norm.

    Args:
        ranks: Each takes its part of the vocabulary.
        columns: Targets a row; 0 for one, in a vector. Rows then share tokens.
        low_rank: Rank of an adapter; 0 for none.
        head: Whether it trains, and what else a Head has, and linear_logprobs.
    """
    draw = torch.Generator().manual_seed(0)
    num_tokens, num_rows, hidden_size, vocab_size = 23, 31, 8, 12
    random = functools.partial(torch.randn, generator=draw)
    weight, bias, a, b = random(vocab_size, 8), random(vocab_size), random(low_rank, 8), random(vocab_size, low_rank)
    hidden = random(num_tokens, hidden_size)
    shape = (num_rows, columns) if columns else (num_tokens,)
    targets = torch.randint(0, vocab_size, shape, generator=draw)
    # Of some rows nothing is asked, so that backward leaves tokens out.
    grad = random(shape) * (torch.arange(shape[0]) % 3 == 0).float().view(-1, *[1] * (len(shape) - 1))
    token_of_row = torch.randint(0, num_tokens, (num_rows,), generator=draw) if columns else None
    trains, kept = head.pop("trains"), {name: head.pop(name) for name in ("keep_logits", "frugal") if name in head}

    def answered(rows: slice, vocabulary: VocabularyPart | None) -> dict[str, torch.Tensor]:
        leaves = {"hidden": hidden, "weight": weight[rows], "bias": bias[rows], "a": a, "b": b[rows]}
        leaf = {name: one.clone().requires_grad_(name != "weight" or trains) for name, one in leaves.items()}
        leaf["bias"].requires_grad_(trains)
        adapter = LowRank(leaf["a"], leaf["b"], 0.5) if low_rank else None
        made = Head(leaf["weight"], leaf["bias"], low_rank=adapter, vocabulary=vocabulary, **head)
        logprobs = linear_logprobs(leaf["hidden"], made, targets, token_of_row, **kept)
        logprobs.backward(grad)
        return {"logprobs": logprobs.detach()} | {n: one.grad for n, one in leaf.items() if one.grad is not None}

    whole = answered(slice(None), None)
    size = vocab_size // ranks.world_size
    own = slice(ranks.rank * size, (ranks.rank + 1) * size)
    found = answered(own, VocabularyPart(torch.distributed.group.WORLD, own.start, size))
    errors: dict[str, float] = {}
    assert found.keys() == whole.keys()
    for name, wanted in whole.items():
        if name in ("hidden", "a"):
            torch.distributed.all_reduce(found[name])
        part = wanted[own] if name in ("weight", "bias", "b") else wanted
        errors[name] = float((found[name] - part).norm() / (part.norm() or 1.0))
    return errors


def kept(ranks: Ranks, folder: Path, checkpoint_dir: Path, **settings: Any) -> dict[str, Any]:
    """What a LoRA run's base takes on this rank, what a forward gathers of it, and what it takes whole, for samples."""
    engine = make_engine(ranks, folder, checkpoint_dir, lora=True, **settings)
    gathered: list[int] = []
    allocate = Gather.allocate

    def counted(self: Gather, *args: Any, **kwargs: Any) -> torch.Tensor:
        room = allocate(self, *args, **kwargs)
        gathered.append(room.nbytes)
        return room

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gather, "allocate", counted)
        engine.forward(RUN, 1, engine.stage(BATCH))
    reshard(engine.run_state(RUN).model)
    return {
        "held": held_bytes(engine.run_state(RUN).model),
        "gathered": sorted(gathered),
        "whole": held_bytes(engine.base_model()),
    }


def timeouts(ranks: Ranks, folder: Path, checkpoint_dir: Path) -> list[float]:
    """Seconds after which the collectives of a run's model fail, by axis of its mesh."""
    parameter: Any = next(make_engine(ranks, folder, checkpoint_dir).run_state(RUN).model.parameters())
    groups: list[Any] = parameter.device_mesh.get_all_groups()
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def sample(
    ranks: Ranks,
    folder: Path,
    checkpoint_dir: Path,
    *,
    lora: bool = False,
    prompts: Sequence[Sequence[int]],
    **settings: Any,
) -> dict[str, Any]:
    """Samples by the base model, frozen weights of a run that trains on, and a checkpoint, all at once and in slices.

    On the leader what came of them; on each rank how many models in parts it held after each slice.
    """
    engine = make_engine(ranks, folder, checkpoint_dir, lora=lora, **settings)
    events: list[WorkerEvent] = []
    sampling = Sampling(engine, checkpoint_dir=checkpoint_dir, send=events.append)
    step(engine, 1, BATCH)
    frozen = str(sampling.samplers.freeze(RUN, 3))
    saved = engine.save_weights_for_sampler(RUN, "weights").path
    step(engine, 4, BATCH)
    for number, path in enumerate(["", frozen, saved] * 2):
        params = SamplingParams(max_tokens=9, temperature=1.0, seed=number)
        request = SampleRequest(
            prompt=ModelInput(tokens=prompts[number % len(prompts)]),
            sampler=Sampler(model_path=path),
            num_samples=2,
            sampling_params=params,
            include_prompt_logprobs=True,
        )
        sampling.takes_next = ranks.leads
        sampling.start(number, WorkerSample(sample_id=str(number), request=request), sampling.read(request))
    # Its requests go on.
    sampling.samplers.close(frozen)
    in_parts, held = sampling.samplers.in_parts, list[int]()
    going_on = True
    while going_on:
        going_on = ranks.execution.tell(sampling.generation.busy)
        sampling.run_for(0)
        if in_parts is not None:
            held.append(len(in_parts._decoders))
    failures = [event.done.error.message for event in events if event.done.HasField("error")]
    assert not failures, failures
    answers: dict[int, dict[Any, Any]] = {}
    for event in events:
        for each in event.sampled.samples:
            found = answers.setdefault(event.command_id, {})
            tokens, logprobs = found.setdefault(each.sample, ([], []))
            tokens += each.tokens
            logprobs += each.logprobs
        if event.sampled.HasField("prompt"):
            answers.setdefault(event.command_id, {})["prompt"] = list(event.sampled.prompt.logprobs)
    return {"answers": answers, "described": sampling.described, "held": held}


def step(engine: Engine, seq_id: int, batch: Batch) -> None:
    """One step with cross-entropy."""
    engine.forward_backward(RUN, seq_id, engine.stage(batch, find_loss("cross_entropy")))
    engine.optim_step(RUN, seq_id + 1, PARAMS)


def save(
    ranks: Ranks, folder: Path, checkpoint_dir: Path, batch: Batch, *, lora: bool = False, exports: bool = True
) -> dict[str, Any]:
    """A step, a state, with exports sampler weights, another step."""
    engine = make_engine(ranks, folder, checkpoint_dir, lora=lora)
    # Leaves some parameters gathered.
    engine.forward(RUN, 1, engine.stage(batch))
    step(engine, 1, batch)
    saved = engine.save_state(RUN, "state")
    if not exports:
        step(engine, 3, batch)
        return {"path": saved.path, "after": tensors(engine)}
    exported = engine.save_weights_for_sampler(RUN, "weights", dtype="float32")
    delta = engine.save_weights_for_sampler(RUN, "delta", delta=True)
    merged = engine.save_weights_for_sampler(RUN, "merged", merged=True) if lora else exported
    found = {"path": saved.path, "sizes": [each.size_bytes for each in (saved, exported, delta, merged)]}
    step(engine, 3, batch)
    return {**found, "after": tensors(engine)}


def merge(
    ranks: Ranks,
    folder: Path,
    checkpoint_dir: Path,
    name: str,
    *,
    unembed: bool = False,
    adapter: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Exports a LoRA run merged, with that adapter or one of random numbers; how much of it was whole at a time."""
    engine = Engine(
        str(folder), device=CPU, checkpoint_dir=checkpoint_dir, settings=EngineSettings(**settings), ranks=ranks
    )
    engine.create_run(RUN, lora=LoraSettings(rank=4, train_unembed=unembed))
    trained = engine.run_state(RUN).trained_parameters()
    generator = np.random.default_rng(0)
    adapter = adapter or {n: generator.standard_normal(p.shape).astype(np.float32) for n, p in trained.items()}
    with torch.no_grad():
        for each, parameter in trained.items():
            parameter.copy_(torch.from_numpy(adapter[each]))
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = [0]

    def counted(tensor: torch.Tensor) -> torch.Tensor:
        made = whole_parameter(tensor)
        alive.add(made)
        most[0] = max(most[0], sum(each.nbytes for each in alive))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streamed_export, "whole_parameter", counted)
        saved = engine.save_weights_for_sampler(RUN, name, merged=True, dtype="float32")
    return {"adapter": adapter, "size": saved.size_bytes, "whole": most[0]}


def go_on(
    ranks: Ranks, folder: Path, checkpoint_dir: Path, batch: Batch, path: str, *, lora: bool = False
) -> dict[str, Any]:
    """Loads a state and takes the step after it."""
    engine = make_engine(ranks, folder, checkpoint_dir, lora=lora)
    loaded = engine.load_state(RUN, path, with_optimizer=True)
    found = {"step": loaded, "loaded": tensors(engine)}
    step(engine, 1, batch)
    return {**found, "after": tensors(engine)}


def snapshot(
    ranks: Ranks, folder: Path, checkpoint_dir: Path, batch: Batch, where: Path, *, lora: bool = False
) -> dict[str, Any]:
    """A snapshot with gradients of one pass, and after another pass a step."""
    engine = make_engine(ranks, folder, checkpoint_dir, lora=lora)
    step(engine, 1, batch)
    engine.forward_backward(RUN, 3, engine.stage(batch, find_loss("cross_entropy")))
    written = threading.Event()
    failures: list[Any] = []
    SnapshotWriter(ranks).take(engine.run_state(RUN), where, lambda failure: (failures.append(failure), written.set()))
    assert written.wait(60)
    assert failures == [None]
    step(engine, 4, batch)
    return {"after": tensors(engine)}


def restore(
    ranks: Ranks, folder: Path, checkpoint_dir: Path, batch: Batch, where: Path, *, lora: bool = False
) -> dict[str, Any]:
    """What comes after the snapshot, from the snapshot."""
    engine = make_engine(ranks, folder, checkpoint_dir, lora=lora)
    engine.restore_run(RUN, where)
    step(engine, 4, batch)
    return {"after": tensors(engine)}


def export(
    ranks: Ranks,
    folder: Path,
    checkpoint_dir: Path,
    path: str,
    name: str,
    *,
    lora: bool = False,
    merged: bool = False,
) -> None:
    """Sampler weights of a state."""
    engine = make_engine(ranks, folder, checkpoint_dir, lora=lora)
    engine.load_state(RUN, path, with_optimizer=False)
    engine.save_weights_for_sampler(RUN, name, dtype="float32", merged=merged)


def adapter(ranks: Ranks, folder: Path, checkpoint_dir: Path, adapter_folder: Path) -> float:
    """How far an adapter's files are from what a run that goes on with it starts from, relative to their norm."""
    engine = make_engine(ranks, folder, checkpoint_dir)
    engine.create_run("another", adapter=str(adapter_folder))
    started = {name: whole_parameter(p).numpy() for name, p in engine.run_state("another").trained_parameters().items()}
    stored = read(adapter_folder / "adapter_model.safetensors")
    errors: list[float] = []
    for name, values in started.items():
        wanted = stored[f"base_model.model.{name.replace('.default.', '.')}"]
        errors.append(float(np.linalg.norm(values - wanted) / np.linalg.norm(wanted)))
    assert len(errors) == len(stored)
    return max(errors)


def refused_model(
    ranks: Ranks,
    folder: Path,
    checkpoint_dir: Path,
    plan: Mapping[str, str] | None = None,
    *,
    headless: bool = False,
) -> tuple[str, str]:
    """Why a model cannot be served, with those rules in transformers' plan of it, or as if its head were not known."""
    config: Any = type(AutoConfig.from_pretrained(folder))
    rules = {**config.base_model_tp_plan, **(plan or {})}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "base_model_tp_plan", rules)
        if headless:
            find_traits = source.find_traits
            patch.setattr(
                source, "find_traits", lambda *args, **kwargs: replace(find_traits(*args, **kwargs), head=None)
            )
        with pytest.raises(GradwireError) as refusal:
            make_engine(ranks, folder, checkpoint_dir)
    return refusal.value.reason, refusal.value.message


def read(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    """A safetensors file."""
    return {name: tensor.numpy() for name, tensor in read_tensors(file).items()}


def refused(ranks: Ranks, folder: Path, checkpoint_dir: Path, path: str) -> tuple[str, str]:
    """Why a state cannot be loaded; training goes on all the same."""
    engine = make_engine(ranks, folder, checkpoint_dir)
    with pytest.raises(GradwireError) as refusal:
        engine.load_state(RUN, path, with_optimizer=True)
    step(engine, 1, BATCH)
    return refusal.value.reason, refusal.value.message


def not_finite(ranks: Ranks, folder: Path, checkpoint_dir: Path, batch: Batch) -> tuple[str, str]:
    """Why a pass was refused; training goes on all the same."""
    engine = make_engine(ranks, folder, checkpoint_dir, max_pack_tokens=9)
    with pytest.raises(GradwireError) as refusal:
        engine.forward_backward(RUN, 1, engine.stage(batch, find_loss("cross_entropy")))
    engine.zero_grad(RUN)
    step(engine, 2, BATCH)
    return refusal.value.reason, refusal.value.message


def sums(ranks: Ranks, sizes: Sequence[int]) -> list[np.ndarray[Any, Any]]:
    """This rank's parts of sums of `summand`, one after the other, as layers' gradients are summed in backward."""
    group = torch.distributed.group.WORLD
    assert group is not None
    add, found = SumInOrder(keep=True), []
    where: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu")}
    for number, size in enumerate(sizes):
        summed, own = add.allocate((size,), **where), add.allocate((size // ranks.world_size,), **where)
        summed.copy_(torch.from_numpy(summand(ranks.rank, number, size)))
        add(own, summed, group, torch.distributed.ReduceOp.SUM)
        found.append(own.numpy())
    return [own.copy() for own in found]


def summand(rank: int, number: int, size: int) -> np.ndarray[Any, Any]:
    """A rank's part of the sum with that number. Rounding tells in which order parts are added up."""
    return np.random.default_rng((rank, number)).standard_normal(size).astype(np.float32) * 10.0 ** (3 * rank)


@garbage_among_all()
def delete(ranks: Ranks, folder: Path, checkpoint_dir: Path, *, lora: bool) -> int:
    """How many of a deleted run's parameters are still there."""
    engine = make_engine(ranks, folder, checkpoint_dir, lora=lora)
    step(engine, 1, BATCH)
    alive = weakref.WeakSet(engine.run_state(RUN).trained_parameters().values())
    assert alive
    engine.delete_run(RUN)
    return len(alive)
