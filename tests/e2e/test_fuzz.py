"""Frames no client of ours would send, over every call: each is answered with a status, and a step works after all."""

from gradwire import ServiceClient

from tests.frames import Frames, send_frames
from tests.trainer_process import TrainerProcess
from tests.training import ADAM, data

NUM_FRAMES = 400
"""benchmarks/fuzz.py sends as many as you like."""


def test_every_frame_is_answered_with_a_status_and_a_step_works_after_all(
    trainer: TrainerProcess, service: ServiceClient
):
    before = {run.run_id for run in service.list_runs()}
    # With an adapter, a state and a name that frames find, for forks, loads and runs that start from it.
    client = service.create_training_client(lora_rank=2)
    client.save_state("a").result(60)
    client.save_weights_for_sampler("a").result(60)
    worker = trainer.worker_pid()
    run_id = client.run_id
    client.close()
    seen = send_frames(trainer.address, Frames(0, run_id), NUM_FRAMES)
    assert {"OK", "INVALID_ARGUMENT", "NOT_FOUND"} <= set(seen)
    assert trainer.process.poll() is None
    assert trainer.worker_pid() == worker
    for made in {run.run_id for run in service.list_runs()} - before:
        service.training_client(made).delete_run()
    with service.create_training_client() as after:
        after.forward_backward(data(6), "cross_entropy")
        assert after.optim_step(ADAM).result(60).step == 1
        after.delete_run()
