"""tinker's endpoints of sampling."""

import contextlib
from typing import Any

from starlette.requests import Request

from trainer_service.gateway.bodies import read_fields
from trainer_service.gateway.endpoints import POLL_S
from trainer_service.gateway.gateway import Gateway
from trainer_service.gateway.sample_polls import CLONE_SIZE
from trainer_service.gateway.sample_requests import read_sample
from trainer_service.gateway.sessions import Caller

_MAX_NUMBER = 10**18 - 1


async def create_sampling_session(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Opens a sampler of a base model, or of saved weights."""
    fields = await read_fields(request)
    session = gateway.sessions.live(fields.text("session_id"), caller)
    number = fields.integer("sampling_session_seq_id", low=0, high=_MAX_NUMBER)
    base_model, model_path = fields.text("base_model", ""), fields.text("model_path", "")
    fields.ignore("type")
    fields.finish()
    if not base_model and not model_path:
        raise fields.wrong("base_model", "and model_path are both missing; one of them says what to sample from.")
    sampler_id = await gateway.sampling_sessions.open(
        session, number, base_model=base_model, model_path=model_path, models=gateway.models
    )
    return {"type": "create_sampling_session", "sampling_session_id": sampler_id}


async def get_sampler(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Describes a sampler."""
    row = gateway.sampling_sessions.row(request.path_params["sampler_id"], caller)
    return {
        "sampler_id": row["sampler_id"],
        "base_model": row["base_model"],
        "model_path": gateway.sampling_sessions.tinker_path(row),
    }


async def retrieve_futures(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Tells which requests of a sampler are answered; waits a while for some."""
    fields = await read_fields(request)
    target = fields.fields("target")
    kind = target.text("type", "sampling_session")
    if kind != "sampling_session":
        raise target.wrong("type", f"is {kind[:40]!r}; it must be sampling_session.")
    sampler_id = target.text("sampling_session_id")
    clone = target.integer("cloned_sampler_id", 0, low=0, high=CLONE_SIZE)
    target.finish()
    cursor = fields.integer("prev_cursor", 0, low=0)
    asked_s = fields.optional_number("timeout")
    retrieved = [one for one in fields.items("retrieved_request_ids", []) if isinstance(one, str)]
    fields.finish()
    row = gateway.sampling_sessions.row(sampler_id, caller)
    gateway.sessions.live(row["session_id"], caller)
    gateway.sampling_sessions.forget(row, retrieved)
    timeout_s = POLL_S if asked_s is None else min(max(0.0, asked_s), POLL_S)
    completions: list[dict[str, Any]] = []
    with contextlib.suppress(TimeoutError):
        async with gateway.long_poll(timeout_s):
            completions, cursor = await gateway.sampling_sessions.answered_since(row, clone, cursor, caller=caller)
    return {"completions": completions, "cursor": cursor}


async def asample(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Submits a request for samples of one prompt."""
    fields = await read_fields(request)
    if fields.has("sampling_session_id"):
        row = gateway.sampling_sessions.row(fields.text("sampling_session_id"), caller)
    else:
        raise fields.wrong("sampling_session_id", "is missing; create_sampling_session makes one.")
    gateway.sessions.live(row["session_id"], caller)
    seq_id = fields.integer("seq_id", low=0, high=_MAX_NUMBER)
    fields.refuse("base_model", "The sampling session says it.")
    fields.refuse("model_path", "The sampling session says it.")
    fields.ignore("type")
    asked = read_sample(fields, gateway.sampling_sessions.source(row))
    request_id = gateway.sampling_sessions.submit(row, seq_id, asked, caller)
    sequences = [f"{request_id}:{number}" for number in range(asked.num_samples)]
    return {"request_id": request_id, "sample_sequence_ids": sequences}
