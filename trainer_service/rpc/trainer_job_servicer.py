"""TrainerJobService: translates and delegates."""

import dataclasses
import re
from pathlib import PurePosixPath
from typing import Any

from gradwire.errors import GradwireError, invalid_field
from gradwire.v1 import trainer_job_service_pb2 as pb
from gradwire.v1.trainer_job_service_pb2_grpc import TrainerJobServiceServicer

from trainer_service.access import current_caller
from trainer_service.jobs.owned import OwnedJobs
from trainer_service.jobs.trainer_job import TrainerJob, TrainerJobSpec, TrainerJobState

_MAX_NAME_LENGTH = 100
_MAX_PATH_LENGTH = 4096
_HOST_PATH = re.compile(r"(?<![\w.-])~?/")
_URL = re.compile(r"https?://\S+")


class TrainerJobServicer(TrainerJobServiceServicer):
    """Serves trainer jobs.

    Args:
        jobs: They.
        embedded: See JobsConfig.
    """

    def __init__(self, jobs: OwnedJobs, *, embedded: bool = False) -> None:
        self._jobs = jobs
        self._embedded = embedded

    async def CreateTrainerJob(self, request: pb.CreateTrainerJobRequest, context: Any) -> pb.CreateTrainerJobResponse:
        spec = read_spec(request, any_folder=self._knows_host)
        job = await self._jobs.create(spec, request_id=request.request_id)
        return pb.CreateTrainerJobResponse(trainer_job=self._message(job))

    async def GetTrainerJob(self, request: pb.GetTrainerJobRequest, context: Any) -> pb.GetTrainerJobResponse:
        return pb.GetTrainerJobResponse(trainer_job=self._message(await self._jobs.get(request.job_id)))

    async def ListTrainerJobs(self, request: pb.ListTrainerJobsRequest, context: Any) -> pb.ListTrainerJobsResponse:
        return pb.ListTrainerJobsResponse(trainer_jobs=[self._message(job) for job in await self._jobs.list()])

    async def DeleteTrainerJob(self, request: pb.DeleteTrainerJobRequest, context: Any) -> pb.DeleteTrainerJobResponse:
        await self._jobs.delete(request.job_id)
        return pb.DeleteTrainerJobResponse()

    @property
    def _knows_host(self) -> bool:
        """Whether the current caller may know of the control plane's host: which folders there are, what logs say."""
        return self._embedded or current_caller.get().admin

    def _message(self, job: TrainerJob) -> pb.TrainerJob:
        return trainer_job_message(job if self._knows_host else without_host(job))


def without_host(job: TrainerJob) -> TrainerJob:
    """A job less what it tells of the control plane's host."""
    message = job.status_message
    if _HOST_PATH.search(_URL.sub("", message)):
        failed = job.state is TrainerJobState.FAILED
        message = (
            f"It {'ended' if failed else 'is starting'}; what it says names folders of the host. Whoever runs the "
            f"control plane finds it in the log of {job.job_id}."
        )
    return dataclasses.replace(job, status_message=message, log_tail="", log_path="")


def read_spec(request: pb.CreateTrainerJobRequest, *, any_folder: bool) -> TrainerJobSpec:
    """The trainer wanted.

    Args:
        request: What was asked.
        any_folder: Whether base_model may be any folder of the control plane's host.

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
    if not any_folder:
        _refuse_other_folders(request.base_model)
    for name, text in (("display_name", request.display_name), ("request_id", request.request_id)):
        if len(text) > _MAX_NAME_LENGTH or not text.isprintable():
            raise invalid_field(
                name,
                f"has {len(text)} characters, or some that do not print; it must be at most {_MAX_NAME_LENGTH} "
                "printable characters.",
            )
    if request.max_context_length == 1:
        raise invalid_field("max_context_length", "is 1; it must be at least 2 tokens, or 0 for the model's own limit.")
    return TrainerJobSpec(
        base_model=request.base_model,
        display_name=request.display_name,
        max_context_length=request.max_context_length,
        any_folder=any_folder,
    )


def _refuse_other_folders(base_model: str) -> None:
    """Refuses paths out of the folder of models, in the same words whether there is something or not."""
    path = PurePosixPath(base_model)
    if path.is_absolute() or base_model.startswith("~") or ".." in path.parts:
        raise _other_folder()


def _other_folder() -> GradwireError:
    return invalid_field(
        "base_model",
        "is a folder of the control plane's host, which an admin's key alone may name. It must be a hub id, or a path "
        "relative to the control plane's --model-dir.",
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
