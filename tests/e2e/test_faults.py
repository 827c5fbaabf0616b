"""Cut connections and killed processes."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from gradwire import AdamParams, SamplingParams, ServiceClient
from gradwire.errors import UnavailableError

from tests.cut_proxy import cut_proxy
from tests.trainer_process import TrainerProcess, running_trainer
from tests.training import all_logprobs, data, negative_log_likelihood
from tests.waiting import wait_until
from trainer_service.executing import noted_operation

ADAM = AdamParams(learning_rate=1e-2)


def steps(client, batch, count: int) -> list:
    """Steps with both kinds of losses, all sent ahead; their futures."""
    futures = []
    for number in range(count):
        if number % 2:
            futures.append(client.forward_backward_custom(batch, negative_log_likelihood))
        else:
            futures.append(client.forward_backward(batch, "cross_entropy"))
        futures.append(client.optim_step(ADAM))
    return futures


def test_a_loop_over_a_connection_cut_again_and_again_is_bit_identical(trainer: TrainerProcess, service: ServiceClient):
    batch = data(30, 20, 40)
    undisturbed = service.create_training_client()
    for future in steps(undisturbed, batch, 12):
        future.result(60)
    with cut_proxy(trainer.address) as proxy, ServiceClient(proxy.base_url) as through:
        client = through.create_training_client()
        client.forward(batch).result(60)
        stop = threading.Event()

        def adversary() -> None:
            rng = np.random.default_rng(0)
            while not stop.wait(rng.uniform(0.01, 0.2)):
                if rng.random() < 0.5:
                    proxy.cut()
                else:
                    proxy.cut_after_bytes = int(rng.integers(1, 3000))

        cutting = threading.Thread(target=adversary)
        cutting.start()
        futures = []
        for _ in range(6):
            futures += steps(client, batch, 2)
            time.sleep(0.05)
        # Every future resolves, once, with the right answer.
        answers = [future.result(60) for future in futures]
        stop.set()
        cutting.join()
        assert [answer.step for answer in answers[1::2]] == list(range(1, 13))
        assert proxy.connections > 3
        client.close()
    after = service.training_client(client.run_id)
    np.testing.assert_array_equal(all_logprobs(after, batch), all_logprobs(undisturbed, batch))
    assert after.get_info().step == 12
    after.delete_run()
    undisturbed.delete_run()


def test_a_trainer_out_of_reach_for_good_ends_in_unavailable(trainer: TrainerProcess, service: ServiceClient):
    with cut_proxy(trainer.address) as proxy, ServiceClient(proxy.base_url, reconnect_timeout_s=1.0) as through:
        client = through.create_training_client()
        client.forward(data(4)).result(60)
        proxy.refusing = True
        proxy.cut()
        with pytest.raises(UnavailableError, match="gave up after 1 s"):
            client.forward(data(4)).result(30)
        proxy.refusing = False
    service.training_client(client.run_id).delete_run()


def test_kill_9_of_the_worker_mid_step_costs_time_and_nothing_else(tiny_llama: Path, tmp_path: Path):
    with (
        running_trainer(tiny_llama, tmp_path, forked=True) as trainer,
        ServiceClient(trainer.base_url, timeout_s=90) as service,
    ):
        undisturbed, client = (service.create_training_client() for _ in range(2))
        batch = data(9, 20)
        for future in [*steps(undisturbed, batch, 6), *steps(client, batch, 2)]:
            future.result(60)
        frozen = client.save_weights_and_get_sampling_client()
        params = SamplingParams(max_tokens=40, seed=7, stop=[])
        sampled = frozen.sample([5, 6, 7], 4, params).result(60)
        worker = trainer.worker_pid()
        sampling = frozen.sample([5, 6, 7], 4, params)
        # Stopped, so that operations are under way when the blow comes.
        os.kill(worker, signal.SIGSTOP)
        pending = steps(client, batch, 4)
        time.sleep(0.2)
        os.kill(worker, signal.SIGKILL)
        assert [future.result(60).step for future in pending[1::2]] == [3, 4, 5, 6]
        # What is sampled from is frozen again as it was; what was being sampled begins again.
        for again in (sampling, frozen.sample([5, 6, 7], 4, params)):
            assert [(one.tokens, one.logprobs) for one in again.result(60).sequences] == [
                (one.tokens, one.logprobs) for one in sampled.sequences
            ]
        assert [run.state for run in service.list_runs()] == ["active", "active"]
        # The other run was idle, and comes back when it is asked.
        np.testing.assert_array_equal(all_logprobs(client, batch), all_logprobs(undisturbed, batch))


def test_sigterm_answers_what_is_queued_and_exits_0(tiny_llama: Path, tmp_path: Path):
    # running_trainer asserts exit code 0 and that no process is left.
    with running_trainer(tiny_llama, tmp_path, forked=True) as trainer:
        service = ServiceClient(trainer.base_url, timeout_s=90, reconnect_timeout_s=0.5)
        client = service.create_training_client()
        futures = steps(client, data(*[40] * 30), 4)
        futures[0].result(60)
        trainer.process.send_signal(signal.SIGTERM)
        for future in futures:
            # Answered, or refused in a sentence; never left hanging.
            error = future.exception(40)
            assert error is None or isinstance(error, UnavailableError), error
        assert trainer.process.wait(40) == 0
        service.close()


@pytest.mark.parametrize("at_once", [False, True], ids=["trainer", "both"])
def test_kill_9_of_the_trainer_leaves_no_process_and_blames_an_operation_only_if_the_worker_dies_too(
    at_once: bool, tiny_llama: Path, tmp_path: Path
):
    with (
        running_trainer(tiny_llama, tmp_path) as trainer,
        ServiceClient(trainer.base_url, timeout_s=90, reconnect_timeout_s=0.5) as service,
    ):
        client = service.create_training_client()
        folder = tmp_path / "data" / "runs" / client.run_id
        future = client.forward(data(*[16] * 4000))
        wait_until(lambda: noted_operation(folder) == 1)
        if at_once:
            # Stopped, so that it does not count the death that comes first.
            trainer.process.send_signal(signal.SIGSTOP)
            os.kill(trainer.worker_pid(), signal.SIGKILL)
        trainer.process.kill()
        trainer.process.wait(10)
        assert isinstance(future.exception(40), UnavailableError)
    # running_trainer has seen the worker gone.
    assert noted_operation(folder) == int(at_once)


def test_a_connection_lost_while_idle_is_taken_up_quietly_by_the_next_call(
    trainer: TrainerProcess, service: ServiceClient, caplog: pytest.LogCaptureFixture
):
    with cut_proxy(trainer.address) as proxy, ServiceClient(proxy.base_url) as through:
        client = through.create_training_client()
        client.forward(data(4)).result(60)
        proxy.cut()
        time.sleep(0.3)
        assert client.forward_backward(data(4), "cross_entropy").result(60)
        assert "connection lost" not in caplog.text
    service.training_client(client.run_id).delete_run()
