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
_LABEL_VALUE = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_URL = re.compile(r"https?://\S+")


class TrainerJobServicer(TrainerJobServiceServicer):
    """Serves trainer jobs.

    Args:
        jobs: The jobs.
        embedded: See JobsConfig.
        own_hosts: Whether each trainer has a host of its own, about which its owner may know everything.
    """

    def __init__(self, jobs: OwnedJobs, *, embedded: bool = False, own_hosts: bool = False) -> None:
        self._jobs = jobs
        self._embedded = embedded
        self._own_hosts = own_hosts

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
        """Whether the current caller may know about the control plane's host: its folders, and what logs say."""
        return self._embedded or current_caller.get().admin

    def _message(self, job: TrainerJob) -> pb.TrainerJob:
        return trainer_job_message(job if self._knows_host or self._own_hosts else without_host(job))


def without_host(job: TrainerJob) -> TrainerJob:
    """A job without what it says about the control plane's host."""
    message = job.status_message
    if _HOST_PATH.search(_URL.sub("", message)):
        failed = job.state is TrainerJobState.FAILED
        message = (
            f"It {'ended' if failed else 'is starting'}; its message names folders of the host. Whoever runs the "
            f"control plane finds it in the log of {job.job_id}."
        )
    return dataclasses.replace(job, status_message=message, log_tail="", log_path="")


def read_spec(request: pb.CreateTrainerJobRequest, *, any_folder: bool) -> TrainerJobSpec:
    """The trainer that a request asks for.

    Args:
        request: The request.
        any_folder: Whether base_model may be any folder of the control plane's host.

    Raises:
        GradwireError: INVALID_FIELD names what is not possible.
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
    if request.accelerator_type and not _LABEL_VALUE.fullmatch(request.accelerator_type):
        raise invalid_field(
            "accelerator_type",
            f"is {request.accelerator_type[:_MAX_NAME_LENGTH]!r}; it must be the value of a node's label: at most 63 "
            'letters, digits, "-", "_" and ".", beginning and ending with a letter or digit.',
        )
    if request.node_count > 1:
        raise invalid_field(
            "node_count",
            f"is {request.node_count}; a trainer job runs on one machine, so it must be 1 or 0. A trainer on several "
            "is started with `gradwire serve --nnodes`, or by the Helm chart with trainer.nodes.count.",
        )
    if request.max_context_length == 1:
        raise invalid_field("max_context_length", "is 1; it must be at least 2 tokens, or 0 for the model's own limit.")
    return TrainerJobSpec(
        base_model=request.base_model,
        display_name=request.display_name,
        max_context_length=request.max_context_length,
        accelerator_type=request.accelerator_type,
        accelerator_count=request.accelerator_count,
        any_folder=any_folder,
    )


def _refuse_other_folders(base_model: str) -> None:
    """Refuses paths outside the folder of models, in the same words whether they exist or not."""
    path = PurePosixPath(base_model)
    if path.is_absolute() or base_model.startswith("~") or ".." in path.parts:
        raise _other_folder()


def _other_folder() -> GradwireError:
    return invalid_field(
        "base_model",
        "is a folder of the control plane's host, which only an admin's key may name. It must be a hub id, or a path "
        "relative to the control plane's --model-dir.",
    )


def trainer_job_message(job: TrainerJob) -> pb.TrainerJob:
    """The job as a message."""
    encoded = pb.TrainerJob(
        job_id=job.job_id,
        job_name=job.job_name,
        base_url=job.base_url,
        base_model=job.base_model,
        state=f"TRAINER_JOB_STATE_{job.state.value}",
        status_message=job.status_message,
        log_tail=job.log_tail,
        log_path=job.log_path,
        ca_certificate=job.ca_certificate,
    )
    encoded.created_at.FromDatetime(job.created_at)
    return encoded
