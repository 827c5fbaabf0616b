"""The SDK against a real trainer and worker, over a real socket."""

import asyncio
import dataclasses
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from gradwire import AdamParams, Datum, ModelInput, ServiceClient, TrainingClient
from gradwire.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    GradwireError,
    NoGradientsError,
    OperationCancelledError,
    PriorOperationFailedError,
)

from tests.trainer_process import TrainerProcess
from tests.training import ADAM, all_logprobs, data, negative_log_likelihood


def forward_passes(trainer: TrainerProcess) -> float:
    """The worker's counter, as Prometheus sees it."""
    with urllib.request.urlopen(f"http://{trainer.metrics_address}/metrics") as answer:
        for line in answer.read().decode().splitlines():
            if line.startswith("gradwire_worker_forward_passes_total "):
                return float(line.split()[1])
    raise AssertionError("no such counter")


def test_a_built_in_loss_learns(client: TrainingClient):
    batch = data(9, 5, 12)
    losses, steps = [], []
    for _ in range(8):
        future = client.forward_backward(batch, "cross_entropy")
        steps.append(client.optim_step(ADAM))
        losses.append(future.result(60).metrics["loss:sum"])
    assert losses[-1] < 0.8 * losses[0]
    assert steps[-1].result(60).step == 8
    assert client.get_info().step == 8


def test_a_custom_loss_does_what_the_built_in_one_does(service: ServiceClient):
    batch = data(9, 5, 12)
    built_in, custom = service.create_training_client(), service.create_training_client()
    for _ in range(3):
        expected = built_in.forward_backward(batch, "cross_entropy")
        got = custom.forward_backward_custom(batch, negative_log_likelihood)
        built_in.optim_step(ADAM)
        custom.optim_step(ADAM)
        assert got.result(60).metrics["loss:sum"] == pytest.approx(expected.result(60).metrics["loss:sum"], rel=1e-5)
        assert got.result().metrics["mine"] == got.result().metrics["loss:sum"]
    np.testing.assert_allclose(all_logprobs(custom, batch), all_logprobs(built_in, batch), rtol=1e-4, atol=1e-5)
    built_in.delete_run()
    custom.delete_run()


def test_a_custom_loss_runs_exactly_one_forward(trainer: TrainerProcess, client: TrainingClient):
    batch = data(9, 5, 12)
    before = forward_passes(trainer)
    client.forward_backward(batch, "cross_entropy").result(60)
    between = forward_passes(trainer)
    client.forward_backward_custom(batch, negative_log_likelihood).result(60)
    assert forward_passes(trainer) - between == between - before > 0


def test_an_optim_step_sent_ahead_waits_for_the_custom_loss_before_it(client: TrainingClient):
    batch = data(6)
    release = threading.Event()

    def slow(datums: list[Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict]:
        assert release.wait(30)
        return negative_log_likelihood(datums, logprobs)

    loss = client.forward_backward_custom(batch, slow)
    step = client.optim_step(ADAM)
    later = client.forward(batch)
    time.sleep(0.2)
    assert not step.done()
    assert not later.done()
    release.set()
    assert step.result(60).step == 1
    # What was asked for after the step sees the step.
    before, after = (f.result(60).loss_fn_outputs[0]["logprobs"].to_numpy() for f in (loss, later))
    assert not np.array_equal(before, after)


def test_forwards_of_further_custom_losses_do_not_wait(client: TrainingClient):
    both_there = threading.Barrier(2, timeout=30)
    entered = []

    def first(datums: list[Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict]:
        entered.append("first")
        both_there.wait()
        return negative_log_likelihood(datums, logprobs)

    one = client.forward_backward_custom(data(6), first)
    two = client.forward_backward(data(7, seed=1), "cross_entropy")
    two.result(60)
    assert not one.done()
    both_there.wait()
    one.result(60)
    assert client.optim_step(ADAM).result(60).metrics["num_sequences:sum"] == 2


def test_forward_may_be_called_inside_a_custom_loss_even_with_a_step_waiting(client: TrainingClient):
    batch = data(6)

    def with_reference(datums: list[Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict]:
        reference = client.forward(datums).result(30).loss_fn_outputs[0]["logprobs"].to_torch()
        return (logprobs[0] - reference).square().sum() - logprobs[0].sum(), {}

    future = client.forward_backward_custom(batch, with_reference)
    step = client.optim_step(ADAM)
    future.result(60)
    assert step.result(60).step == 1


def test_other_calls_inside_a_custom_loss_are_refused_instead_of_hanging(client: TrainingClient):
    def wrong(datums: list[Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict]:
        client.optim_step(ADAM).result(30)
        return logprobs[0].sum(), {}

    with pytest.raises(RuntimeError, match="inside a custom loss"):
        client.forward_backward_custom(data(6), wrong).result(60)


def test_an_exception_in_the_loss_reaches_the_future_and_leaves_the_run_clean(client: TrainingClient):
    class Mine(Exception):
        pass

    def broken(datums: list[Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict]:
        raise Mine("on purpose")

    batch = data(6, 4)
    before = all_logprobs(client, batch)
    with pytest.raises(Mine, match="on purpose"):
        client.forward_backward_custom(batch, broken).result(60)
    with pytest.raises(NoGradientsError):
        client.optim_step(ADAM).result(60)
    np.testing.assert_array_equal(all_logprobs(client, batch), before)
    client.forward_backward_custom(batch, negative_log_likelihood)
    assert client.optim_step(ADAM).result(60).step == 1


def test_a_step_already_behind_a_failing_loss_is_refused_and_not_half_applied(client: TrainingClient):
    batch = data(6, 4)
    release = threading.Event()

    def broken(datums: list[Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict]:
        assert release.wait(30)
        raise ZeroDivisionError

    before = all_logprobs(client, batch)
    client.forward_backward(batch, "cross_entropy")
    loss = client.forward_backward_custom(batch, broken)
    step = client.optim_step(ADAM)
    release.set()
    with pytest.raises(ZeroDivisionError):
        loss.result(60)
    with pytest.raises(PriorOperationFailedError):
        step.result(60)
    np.testing.assert_array_equal(all_logprobs(client, batch), before)
    client.forward_backward(batch, "cross_entropy")
    assert client.optim_step(ADAM).result(60).step == 1


def test_a_datum_the_loss_ignores_contributes_nothing(service: ServiceClient):
    batch = data(9, 5)
    alone, together = service.create_training_client(), service.create_training_client()
    alone.forward_backward_custom(batch[:1], lambda d, lp: (-lp[0].sum(), {}))
    together.forward_backward_custom(batch, lambda d, lp: (-lp[0].sum(), {}))
    norms = [c.optim_step(ADAM).result(60).metrics["grad_norm:mean"] for c in (alone, together)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    alone.delete_run()
    together.delete_run()


def test_a_batch_split_into_many_messages_is_one_batch(service: ServiceClient):
    batch = data(*[30] * 40)
    whole, split = service.create_training_client(), service.create_training_client()
    split._calls.limits = dataclasses.replace(split._calls.limits, target_message_bytes=2_000)
    for fn in ("cross_entropy", negative_log_likelihood):
        results = []
        for each in (whole, split):
            built_in = isinstance(fn, str)
            loss = each.forward_backward(batch, fn) if built_in else each.forward_backward_custom(batch, fn)
            results.append((loss, each.optim_step(ADAM)))
        (one, step_one), (other, step_other) = results
        assert one.result(60).metrics["loss:sum"] == pytest.approx(other.result(60).metrics["loss:sum"], rel=1e-6)
        assert step_one.result(60).metrics["grad_norm:mean"] == pytest.approx(
            step_other.result(60).metrics["grad_norm:mean"], rel=1e-5
        )
        for a, b in zip(one.result().loss_fn_outputs, other.result().loss_fn_outputs, strict=True):
            np.testing.assert_allclose(a["logprobs"].to_numpy(), b["logprobs"].to_numpy(), rtol=1e-5, atol=1e-5)
    assert split.get_info().step == whole.get_info().step == 2
    whole.delete_run()
    split.delete_run()


def test_accumulated_calls_equal_one(service: ServiceClient):
    batch = data(9, 5, 12)
    one, many = service.create_training_client(), service.create_training_client()
    for _ in range(2):
        one.forward_backward(batch, "cross_entropy")
        for datum in batch:
            many.forward_backward([datum], "cross_entropy")
        norms = [
            c.optim_step(ADAM, grad_accumulation_normalization="num_sequences").result(60).metrics["grad_norm:mean"]
            for c in (one, many)
        ]
        assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    np.testing.assert_allclose(all_logprobs(one, batch), all_logprobs(many, batch), rtol=1e-4, atol=1e-5)
    one.delete_run()
    many.delete_run()


def test_soft_targets_come_back_in_their_shape(client: TrainingClient):
    targets = np.array([[4, 5], [6, 7], [8, 9]])
    weights = np.full((3, 2), 0.5, dtype=np.float32)
    datum = Datum(ModelInput.from_ints([3, 4, 6]), {"target_tokens": targets, "weights": weights})
    output = client.forward_backward([datum], "cross_entropy").result(60)
    assert output.loss_fn_outputs[0]["logprobs"].shape == [3, 2]
    seen = []
    client.forward_backward_custom([datum], lambda d, lp: (seen.append(lp[0].shape) or -lp[0].sum(), {})).result(60)
    assert seen == [(3, 2)]


def test_saved_parameters_load_with_plain_transformers(client: TrainingClient):
    batch = data(9, 5)
    client.forward_backward(batch, "cross_entropy")
    client.optim_step(ADAM)
    saved = client.save_weights_for_sampler_ext("final", checkpoint_type="base")
    assert saved.snapshot_name == "final"
    assert saved.path == f"gradwire://{client.run_id}/sampler_weights/final"
    folder = Path(saved.uri.removeprefix("file://"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode("abc")
    expected = all_logprobs(client, batch[:1])
    with torch.no_grad():
        logits = model(torch.tensor([batch[0].model_input.to_ints()])).logits[0]
    targets = batch[0].loss_fn_inputs["target_tokens"].to_torch()
    got = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(AlreadyExistsError, match="overwrite"):
        client.save_weights_for_sampler("final").result(60)
    client.save_weights_for_sampler("final", overwrite=True).result(60)


def test_a_resumed_run_goes_on_as_if_it_had_never_stopped(service: ServiceClient, client: TrainingClient):
    def train(trained: TrainingClient) -> list[float]:
        losses = [trained.forward_backward(data(6, 9), "cross_entropy") for _ in range(2)]
        trained.optim_step(ADAM)
        losses.append(trained.forward_backward(data(7), "cross_entropy"))
        return [loss.result(60).metrics["loss:sum"] for loss in losses]

    train(client)
    client.optim_step(ADAM)
    path = client.save_state("halfway").result(60)
    assert path == f"gradwire://{client.run_id}/state/halfway"
    uninterrupted = train(client)
    # Loading drops what was accumulated, and leaves what was saved as it is.
    client.load_state_with_optimizer(path).result(60)
    assert client.get_info().step == 2
    assert train(client) == uninterrupted
    with service.create_training_client_from_state_with_optimizer(path) as resumed:
        assert resumed.get_info().step == 2
        assert train(resumed) == uninterrupted
        resumed.delete_run()
    with service.create_training_client_from_state(path) as without_optimizer:
        cold = train(without_optimizer)
        assert cold[:2] == uninterrupted[:2]
        assert cold[2] != uninterrupted[2]
        without_optimizer.delete_run()


def test_futures_are_awaitable(client: TrainingClient):
    async def step() -> int:
        loss = client.forward_backward(data(6), "cross_entropy")
        applied = client.optim_step(ADAM)
        await loss
        return (await applied).step

    assert asyncio.run(step()) == 1


def test_answers_carry_their_times(client: TrainingClient):
    output = client.forward_backward(data(6), "cross_entropy").result(60)
    assert output.timing.execute_ms > 0
    assert output.timing.transfer_ms > 0


def test_a_delta_is_sampled_from_as_the_weights_it_stands_for(service: ServiceClient, client: TrainingClient):
    with pytest.raises(FailedPreconditionError, match="has saved no base"):
        client.save_weights_for_sampler_ext("early", checkpoint_type="delta")
    client.save_weights_for_sampler_ext("base")
    client.forward_backward(data(6), "cross_entropy")
    client.optim_step(ADAM)
    delta = client.save_weights_for_sampler_ext("delta", checkpoint_type="delta")
    whole = client.save_weights_for_sampler_ext("whole")
    found = [
        service.create_sampling_client(model_path=saved.path).compute_logprobs([5, 6, 7]).result(60)
        for saved in (delta, whole)
    ]
    assert found[0] == found[1]
    with pytest.raises(ValueError, match='"base" or "delta"'):
        client.save_weights_for_sampler_ext("a", checkpoint_type="gamma")


def test_what_a_trainer_writes_is_its_owner_s_alone(trainer: TrainerProcess, client: TrainingClient):
    client.forward_backward(data(4), "cross_entropy")
    client.optim_step(AdamParams())
    client.save_state("kept")
    client.save_weights_for_sampler("kept").result(60)
    data_dir = trainer.log.parent / "data"
    written = [data_dir, *data_dir.rglob("*")]
    assert {"journal.sqlite", "journal.sqlite-wal", "owner.json", "manifest.json"} <= {path.name for path in written}
    assert [str(path) for path in written if path.stat().st_mode & 0o077] == []


def test_another_model_is_refused_naming_both(service: ServiceClient, trainer: TrainerProcess):
    with pytest.raises(FailedPreconditionError, match="some/other-model") as caught:
        service.create_training_client("some/other-model")
    assert caught.value.reason == "BASE_MODEL_MISMATCH"
    assert "tiny_llama" in str(caught.value)


def test_a_second_client_takes_the_run_over_and_the_first_is_told(service: ServiceClient, client: TrainingClient):
    client.forward_backward(data(6), "cross_entropy").result(60)
    second = service.training_client(client.run_id)
    assert second.optim_step(ADAM).result(60).step == 1
    with pytest.raises(GradwireError) as caught:
        client.zero_grad().result(60)
    assert caught.value.reason == "ATTACH_SUPERSEDED"
    second.close()


def test_a_closed_client_fails_its_futures_at_once(service: ServiceClient):
    client = service.create_training_client()
    client.forward(data(4)).result(60)
    client.close()
    with pytest.raises(OperationCancelledError):
        client.forward(data(4)).result(10)
    service.training_client(client.run_id).delete_run()


def test_an_abandoned_client_detaches_by_itself(service: ServiceClient):
    client = service.create_training_client()
    client.forward(data(4)).result(60)
    run_id = client.run_id
    del client
    deadline = time.monotonic() + 10
    while service_attached(service, run_id) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not service_attached(service, run_id)
    service.training_client(run_id).delete_run()


def service_attached(service: ServiceClient, run_id: str) -> bool:
    """Whether a client holds the run."""
    return {run.run_id: run.attached for run in service.list_runs()}[run_id]
