"""Endpoints of Fireworks' API: its account, trainer jobs, and what its SDK asks of a job beyond tinker's endpoints."""

from typing import Any

from starlette.requests import Request

from trainer_service.gateway import request_translation, training_api
from trainer_service.gateway.bodies import parse_fields, read_body, read_fields
from trainer_service.gateway.endpoints import Handler
from trainer_service.gateway.fireworks_jobs import ACCOUNT, base_model_of, describe
from trainer_service.gateway.gateway import Gateway
from trainer_service.gateway.outcomes import Refusal
from trainer_service.gateway.sessions import Caller

_STANDING = "The trainer behind this gateway is there already and has what it was started with; leave it out."
_NOT_CHOSEN = (
    *("acceleratorType", "acceleratorCount", "customImageTag", "region", "extraArgs", "projectionHeadDim"),
    *("trainerReplicaCount", "reservationTarget", "hotLoadDeploymentId", "extraValues"),
    *("preemptible", "inactivityTimeout", "disableInactivityCleanup", "keepAlive", "dataset"),
)


async def list_accounts(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """The only account there is."""
    await gateway.trainers.served(caller.key)
    return {"accounts": [{"name": f"accounts/{ACCOUNT}"}]}


async def create_job(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Creates a job on a trainer that serves the model asked for."""
    _check_account(request)
    query = request.query_params
    for name in ("trainingShape", "deploymentId"):
        if query.get(name):
            raise Refusal(400, f"{name} is not served by this gateway. {_STANDING}", reason="NOT_IMPLEMENTED")
    fields = await read_fields(request)
    config = fields.fields("trainingConfig")
    base_model, lora_rank = config.text("baseModel"), config.integer("loraRank", 0, low=0, high=(1 << 31) - 1)
    # The longest sequence is the trainer's own, and each step says its learning rate.
    config.ignore("maxContextLength", "learningRate")
    display_name = fields.text("displayName", "")
    fields.ignore("serviceMode", "forwardOnly", "purpose", "managedBy", "useReservation")
    for part in (config, fields):
        for name in _NOT_CHOSEN:
            part.refuse(name, _STANDING)
    fields.refuse("nodeCount", _STANDING, unless=lambda count: count == 1)
    config.finish()
    fields.finish()
    served = await gateway.trainers.find(base_model, caller.key)
    job_id = gateway.jobs.create(
        caller, query.get("rlorTrainerJobId", ""), display_name=display_name, lora_rank=lora_rank, served=served
    )
    return await _described(gateway, caller, job_id)


async def get_job(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Describes one job."""
    _check_account(request)
    return await _described(gateway, caller, request.path_params["job_id"])


async def list_jobs(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Lists the caller's jobs, newest first."""
    _check_account(request)
    return {"rlorTrainerJobs": [await _described(gateway, caller, row["job_id"]) for row in gateway.jobs.of(caller)]}


async def delete_job(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Ends a job, and the sessions in it; the trainer goes on, and checkpoints stay."""
    _check_account(request)
    row = gateway.jobs.find(request.path_params["job_id"], caller)
    gateway.jobs.delete(row)
    for session_id in gateway.jobs.sessions(row):
        gateway.end_session(session_id, caller, {"type": "job_deleted"})
    return {}


async def resume_job(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Does nothing: a job runs until it is deleted."""
    return await get_job(gateway, caller, request)


def _check_account(request: Request) -> None:
    account = request.path_params["account"]
    if account != ACCOUNT:
        raise Refusal(404, f"There is no account {account[:100]!r}; yours is {ACCOUNT!r}.", reason="ACCOUNT_NOT_FOUND")


async def _described(gateway: Gateway, caller: Caller, job_id: str) -> dict[str, Any]:
    row = gateway.jobs.find(job_id, caller)
    model = await gateway.trainers.find(base_model_of(row), caller.key)
    return describe(row, max_context_length=model.max_context_length or 0)


def in_job(handler: Handler) -> Handler:
    """An endpoint below a job, which has to be the caller's."""

    async def checked(gateway: Gateway, caller: Caller, request: Request) -> Any:
        _check_account(request)
        gateway.jobs.find(request.path_params["job_id"], caller)
        return await handler(gateway, caller, request)

    return checked


async def create_session(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Begins a session, which ends with the job at the latest."""
    row = gateway.jobs.find(request.path_params["job_id"], caller)
    answer = await training_api.create_session(gateway, caller, request)
    gateway.jobs.add_session(row, answer["session_id"])
    return answer


async def forward(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Submits a forward whose body is JSON."""
    return await _json_pass(gateway, caller, request, request_translation.FORWARD_JSON)


async def forward_backward(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Submits a forward_backward whose body is JSON."""
    return await _json_pass(gateway, caller, request, request_translation.FORWARD_BACKWARD_JSON)


async def _json_pass(gateway: Gateway, caller: Caller, request: Request, kind: str) -> Any:
    body = await read_body(request)
    return training_api.submit(gateway, caller, parse_fields(body), kind, body)


async def unload_model(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Deletes the model's run; its checkpoints stay."""
    fields = await read_fields(request)
    model_id = fields.text("model_id")
    fields.ignore("type")
    fields.finish()
    await gateway.models.unload(model_id, caller)
    return {"request_id": f"{model_id}:unload", "model_id": model_id}
