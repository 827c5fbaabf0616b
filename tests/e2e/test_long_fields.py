"""Far more in one field than is taken, in every field of every call: refused, and nobody else is the worse for it."""

from gradwire import ServiceClient

from tests.bystander import Bystander
from tests.long_fields import send_long_fields
from tests.trainer_process import TrainerProcess

SIZE_BYTES = 1 << 20
"""benchmarks/fuzz.py sends more."""


def test_a_field_that_is_far_too_long_is_refused_and_another_run_trains_on_with_the_same_numbers(
    trainer: TrainerProcess, service: ServiceClient
):
    worker = trainer.worker_pid()
    with service.create_training_client() as client, Bystander(trainer.base_url):
        answers = list(send_long_fields(trainer.address, SIZE_BYTES, run_id=client.run_id))
        client.delete_run()
    assert len(answers) > 60
    taken = [answer for answer in answers if not answer.status.startswith("RESOURCE_EXHAUSTED")]
    # As many tokens and elements as that are taken, and then found to fit nothing.
    assert {answer.field.rpartition(".")[2] for answer in taken} <= {"data", "values", "tokens"}, taken
    statuses = {answer.status.partition(":")[0] for answer in taken}
    assert statuses <= {"INVALID_ARGUMENT", "FAILED_PRECONDITION", "NOT_FOUND"}, taken
    assert trainer.worker_pid() == worker
