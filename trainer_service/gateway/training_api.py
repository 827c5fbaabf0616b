"""tinker's endpoints of sessions, models and their operations."""

import asyncio
import re
from typing import Any

from gradwire.v1.trainer_service_pb2 import CreateRunRequest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from trainer_service.gateway import request_translation
from trainer_service.gateway.bodies import Fields, parse_fields, read_body, read_fields
from trainer_service.gateway.endpoints import POLL_S
from trainer_service.gateway.gateway import Gateway
from trainer_service.gateway.model_line import request_id_of
from trainer_service.gateway.outcomes import Outcome, Refusal, unserved
from trainer_service.gateway.sessions import Caller

_REQUEST_ID = re.compile(r"([0-9a-f-]{36}:(train|sample):[0-9]{1,18}):([0-9]{1,18}|unload)", re.ASCII)
_MAX_NUMBER = 10**18 - 1
_SDK_METHOD = "x-sdk-method"


async def client_config(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Settings for the client. Also tells it at once if its key is not valid."""
    fields = await read_fields(request)
    fields.ignore("sdk_version")
    served = await gateway.trainers.served(caller.key)
    limits = [one.info.limits for one in served]
    smallest = min((one.max_message_bytes for one in limits), default=64 << 20)
    config = {
        # A datum more may follow when the estimate is reached.
        "fwdbwd_max_chunk_bytes_count": min(5_000_000, smallest // 4),
        "fwdbwd_max_chunk_len": min((one.max_datums for one in limits), default=1024) if limits else 1024,
        "parallel_fwdbwd_chunks": True,
        "sample_max_concurrent_requests": 4096,
        # One long poll for all samples of a client, instead of one each.
        "sample_use_retrieve_futures": True,
    }
    # The SDK asks this over a connection that it does not use again and never closes.
    return JSONResponse(config, headers={"connection": "close"})


async def dynamic_config(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Flags that the client asks for again now and then."""
    await read_body(request)
    return {"sample_cancel_enabled": True}


async def create_session(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Begins a session."""
    fields = await read_fields(request)
    about = {
        "tags": fields.items("tags", []),
        "user_metadata": fields.texts("user_metadata"),
        "display_name": fields.text("display_name", ""),
        "project_id": fields.text("project_id", ""),
    }
    fields.ignore("sdk_version", "type")
    fields.finish()
    # Without a valid key nothing begins.
    await gateway.trainers.served(caller.key)
    return {"type": "create_session", "session_id": gateway.sessions.create(caller, about).session_id}


async def session_heartbeat(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Notes a heartbeat of the client."""
    fields = await read_fields(request)
    gateway.sessions.live(fields.text("session_id"), caller)
    return {"type": "session_heartbeat"}


async def finish_session(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Ends a session whose client is done."""
    fields = await read_fields(request)
    reason = fields.fields("reason").text("type", "success")
    session = gateway.sessions.find(request.path_params["session_id"], caller)
    if session.ended_by is None:
        gateway.finish(session, {"type": "client_finished", "reason": reason, "detail": fields.text("detail", "")})
    return Response(status_code=200)


async def telemetry(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Drops telemetry."""
    await read_body(request)
    return {"status": "accepted"}


async def create_model(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Makes a new model."""
    fields = await read_fields(request)
    session = gateway.sessions.live(fields.text("session_id"), caller)
    number = fields.integer("model_seq_id", low=0, high=_MAX_NUMBER)
    run = CreateRunRequest(user_metadata=fields.texts("user_metadata"))
    lora = fields.fields("lora_config")
    run.lora_rank = lora.integer("rank", 0, low=0, high=(1 << 31) - 1)
    if run.lora_rank:
        for name in ("train_mlp", "train_attn", "train_unembed"):
            if lora.has(name):
                setattr(run, name, lora.flag(name))
        if (seed := lora.optional_integer("seed")) is not None:
            run.seed = seed % (1 << 64)
        if (alpha := lora.optional_number("alpha")) is not None:
            run.lora_alpha = alpha
        lora.refuse(
            "init_method", "Adapters begin as kaiming says; leave it out.", unless=lambda method: method == "kaiming"
        )
    else:
        # All parameters train, so there is nothing that these would choose from.
        lora.ignore("train_mlp", "train_attn", "train_unembed", "seed", "alpha", "init_method")
    lora.finish()
    _only_adamw(fields)
    fields.ignore("type")
    base_model = fields.text("base_model")
    fields.refuse("base_only", "Use a sampler of the base model, and compute_logprobs.")
    fields.refuse("projection_head_dim", "Models here make logits alone.")
    fields.finish()
    model_id = await gateway.models.create(session, number, base_model, run)
    return {"request_id": request_id_of(model_id, 0), "model_id": model_id}


def _only_adamw(fields: Fields) -> None:
    kind = fields.fields("optimizer_config").text("type", "adamw")
    if kind != "adamw":
        raise unserved(f"The optimizer {kind[:40]!r}", "Leave optimizer_config out; AdamW is what there is.")


async def load_weights(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Loads a state into a model, or makes a new model of it."""
    body = await read_body(request)
    fields = parse_fields(body)
    if not fields.has("session_id"):
        return submit(gateway, caller, fields, "load_weights", body)
    session = gateway.sessions.live(fields.text("session_id"), caller)
    number = fields.integer("model_seq_id", low=0, high=_MAX_NUMBER)
    path, with_optimizer = fields.text("path"), fields.flag("optimizer")
    run = CreateRunRequest(user_metadata=fields.texts("user_metadata"))
    _only_adamw(fields)
    fields.refuse("weights_access_token", "Use a key that may see the checkpoint.")
    fields.ignore("type")
    base_model = fields.text("base_model", "")
    fields.finish()
    if base_model:
        await gateway.trainers.find(base_model, caller.key)
    model_id = await gateway.models.create_from(session, number, path, with_optimizer=with_optimizer, request=run)
    return {"request_id": request_id_of(model_id, 0), "model_id": model_id}


async def get_info(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Describes a model."""
    fields = await read_fields(request)
    row = gateway.models.row(fields.text("model_id"), caller)
    about = gateway.models.describe(row)
    served = await gateway.trainers.served(caller.key)
    architectures = [
        one.architecture for model in served for one in model.info.models if one.base_model == about["base_model"]
    ]
    data = {
        "arch": architectures[0] if architectures else None,
        "model_name": about["model_name"],
        "tokenizer_id": about["model_name"],
    }
    lora_rank = about["lora_rank"]
    return {
        "type": "get_info",
        "model_data": data,
        "model_id": row["model_id"],
        "model_name": about["model_name"],
        "is_lora": lora_rank > 0,
        "lora_rank": lora_rank or None,
    }


async def forward_backward(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Submits a forward, or a forward_backward."""
    body = await read_body(request)
    message = request_translation.parse_pass(body)
    method = request.headers.get(_SDK_METHOD)
    # An older SDK does not say which of its methods a request comes from.
    maybe_custom = method is None or ".forward_backward_custom" in method
    kind = request_translation.CUSTOM if maybe_custom else request_translation.FORWARD_BACKWARD
    line = gateway.models.line(message.model_id, caller)
    return {"request_id": line.submit(message.seq_id, kind, body, message), "model_id": line.model_id}


def submit(gateway: Gateway, caller: Caller, fields: Fields, kind: str, body: bytes) -> dict[str, str]:
    """An operation whose body is JSON; what is wrong with it is told by its future, since its number counts."""
    line = gateway.models.line(fields.text("model_id"), caller)
    return {"request_id": line.submit(fields.integer("seq_id"), kind, body), "model_id": line.model_id}


async def json_operation(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Submits an optim_step or a save, by the path's last word."""
    body = await read_body(request)
    return submit(gateway, caller, parse_fields(body), request.url.path.rpartition("/")[2], body)


async def retrieve_future(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """The outcome of a request; waits a while for it."""
    fields = await read_fields(request)
    request_id = fields.text("request_id")
    try:
        async with gateway.long_poll(POLL_S):
            found = await _outcome(gateway, caller, request_id)
    except TimeoutError:
        body = {"type": "try_again", "request_id": request_id, "queue_state": "active"}
        # A status of its own rather than a result, which the client would log with every turn.
        return JSONResponse(body, 408)
    return Response(found.body, media_type=found.media_type)


async def _outcome(gateway: Gateway, caller: Caller, request_id: str) -> Outcome:
    parsed = _REQUEST_ID.fullmatch(request_id)
    if parsed is None:
        raise Refusal(404, f"There is no future {request_id[:200]!r}.", reason="FUTURE_NOT_FOUND")
    whose, kind, number = parsed.groups()
    if kind == "sample":
        # A client that waits for an answer lives.
        gateway.sessions.live(whose.partition(":")[0], caller)
        return await gateway.sampling_sessions.outcome(request_id, caller)
    if number == "unload":
        return Outcome.result(type="unload_model", model_id=gateway.models.row(whose, caller)["model_id"])
    line = gateway.models.line(whose, caller)
    return await (line.outcome(int(number)) if int(number) else asyncio.shield(line.made))


async def cancel_future(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Gives up a sample that nobody waits for any more."""
    fields = await read_fields(request)
    gateway.sampling_sessions.cancel(fields.text("request_id"), caller)
    return {}


async def unserved_custom_loss(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Losses that run on the server."""
    raise unserved("A loss that runs on the server", "forward_backward_custom runs it in your process.")
