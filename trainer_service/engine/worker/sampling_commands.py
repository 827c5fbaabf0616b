"""Commands of sampling, which overtake the operations of runs."""

from gradwire.v1.worker_service_pb2 import WorkerCommand

from trainer_service.engine.sampling.service import Sampling
from trainer_service.engine.worker.prepared import Work

KINDS = frozenset({"sample", "cancel_sample", "open_sampler", "close_sampler"})


def prepare_sampling(kind: str, command: WorkerCommand, sampling: Sampling) -> Work:
    """Decodes and checks a command of one of KINDS.

    Raises:
        GradwireError: The sample request is invalid.
    """
    match kind:
        case "sample":
            request = sampling.read(command.sample.request)
            return lambda: sampling.start(command.command_id, command.sample, request)
        case "cancel_sample":
            return lambda: sampling.generation.cancel(command.cancel_sample.sample_id)
        case "open_sampler":
            opened = command.open_sampler
            return lambda: sampling.open(opened.sampler.model_path, lease_ms=opened.lease_ms)
        case _:
            return lambda: sampling.samplers.close(command.close_sampler.sampler.model_path)
