"""TrainerJobService: translates and delegates."""

from typing import Any

from gradwire.errors import invalid_field
from gradwire.v1 import trainer_job_service_pb2 as pb
from gradwire.v1.trainer_job_service_pb2_grpc import TrainerJobServiceServicer

from trainer_service.jobs.trainer_job import TrainerJob, TrainerJobs, TrainerJobSpec

_MAX_NAME_LENGTH = 100
_MAX_PATH_LENGTH = 4096


class TrainerJobServicer(TrainerJobServiceServicer):
    """Serves one place where trainers run.

    Args:
        jobs: It.
    """

    def __init__(self, jobs: TrainerJobs) -> None:
        self._jobs = jobs

    async def CreateTrainerJob(self, request: pb.CreateTrainerJobRequest, context: Any) -> pb.CreateTrainerJobResponse:
        job = await self._jobs.create(read_spec(request), request_id=request.request_id)
        return pb.CreateTrainerJobResponse(trainer_job=trainer_job_message(job))

    async def GetTrainerJob(self, request: pb.GetTrainerJobRequest, context: Any) -> pb.GetTrainerJobResponse:
        return pb.GetTrainerJobResponse(trainer_job=trainer_job_message(await self._jobs.get(request.job_id)))

    async def ListTrainerJobs(self, request: pb.ListTrainerJobsRequest, context: Any) -> pb.ListTrainerJobsResponse:
        return pb.ListTrainerJobsResponse(trainer_jobs=[trainer_job_message(job) for job in await self._jobs.list()])

    async def DeleteTrainerJob(self, request: pb.DeleteTrainerJobRequest, context: Any) -> pb.DeleteTrainerJobResponse:
        await self._jobs.delete(request.job_id)
        return pb.DeleteTrainerJobResponse()


def read_spec(request: pb.CreateTrainerJobRequest) -> TrainerJobSpec:
    """The trainer wanted.

    Raises:
        GradwireError: INVALID_FIELD names what cannot be.
    """
    if not request.base_model.strip():
        raise invalid_field("base_model", "is empty; it must be a hub id or a folder on the control plane's host.")
    if len(request.base_model) > _MAX_PATH_LENGTH or not request.base_model.isprintable():
        # It goes onto a command line.
        raise invalid_field(
            "base_model",
            f"has {len(request.base_model)} characters, or some that do not print; it must be at most "
            f"{_MAX_PATH_LENGTH} printable characters.",
        )
    if len(request.display_name) > _MAX_NAME_LENGTH or not request.display_name.isprintable():
        raise invalid_field(
            "display_name",
            f"has {len(request.display_name)} characters, or some that do not print; it must be at most "
            f"{_MAX_NAME_LENGTH} printable characters.",
        )
    if request.max_context_length == 1:
        raise invalid_field("max_context_length", "is 1; it must be at least 2 tokens, or 0 for the model's own limit.")
    return TrainerJobSpec(
        base_model=request.base_model,
        display_name=request.display_name,
        max_context_length=request.max_context_length,
    )


def trainer_job_message(job: TrainerJob) -> pb.TrainerJob:
    """The job as it travels."""
    encoded = pb.TrainerJob(
        job_id=job.job_id,
        job_name=job.job_name,
        base_url=job.base_url,
        base_model=job.base_model,
        state=f"TRAINER_JOB_STATE_{job.state.value}",
        status_message=job.status_message,
        log_tail=job.log_tail,
        log_path=job.log_path,
    )
    encoded.created_at.FromDatetime(job.created_at)
    return encoded
