"""tinker's endpoints that list runs, checkpoints and sessions. The trainers answer, for the caller's key."""

import asyncio
import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from gradwire.errors import GradwireError
from gradwire.v1 import checkpoint_service_pb2 as checkpoints
from gradwire.v1.checkpoint_pb2 import CHECKPOINT_KIND_STATE, Checkpoint
from gradwire.v1.run_pb2 import RUN_STATE_LOST, Run
from gradwire.v1.trainer_service_pb2 import GetRunRequest, ListRunsRequest
from starlette.requests import Request
from starlette.responses import Response

from trainer_service.gateway import paths
from trainer_service.gateway.bodies import read_fields
from trainer_service.gateway.gateway import Gateway
from trainer_service.gateway.gateway_metrics import metrics_text
from trainer_service.gateway.outcomes import Refusal, unserved
from trainer_service.gateway.sessions import Caller, Session
from trainer_service.gateway.trainers import Trainer
from trainer_service.paths import SAMPLER_WEIGHTS

_MAX_LIMIT = 10_000
_DOWNLOAD = "`gradwire export PATH` fetches sampler weights as a Hugging Face or peft folder from the trainer itself."


async def get_server_capabilities(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """What can be trained and sampled."""
    served = await gateway.trainers.served(caller.key)
    return {
        "supported_models": [
            {
                "model_name": one.name,
                "max_context_length": one.max_context_length,
                "trainable": True,
                "sampleable": True,
            }
            for one in served
        ]
    }


async def healthz(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Tells that the gateway runs."""
    return {"status": "ok"}


async def metrics(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Metrics for Prometheus; like all else, for callers with a key."""
    await gateway.trainers.served(caller.key)
    return Response(metrics_text(gateway), media_type="text/plain; version=0.0.4; charset=utf-8")


async def api_key(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Whether a key is valid, as `tinker auth login` asks."""
    await gateway.trainers.served(caller.key)
    return {"key_id": 0, "name": "gradwire", "note": "", "details": {"type": "user"}}


async def delete_api_key(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Refuses to make keys: they belong to the trainers."""
    raise unserved("Revoking a key", "Take it out of the trainer's --api-key-file.")


# ── runs ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def list_training_runs(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """The caller's runs, newest first; those that are gone, as far as checkpoints tell of them."""
    saved = await _checkpoints(gateway, caller)
    name_of = gateway.trainers.name_of
    runs: list[dict[str, Any]] = []
    alive: set[str] = set()
    for trainer in gateway.trainers.all:
        answer = await trainer.call(trainer.runs.ListRuns, ListRunsRequest(), caller.key)
        runs += [_run(run, [one for one in saved if one.run_id == run.run_id], name_of) for run in answer.runs]
        alive |= {run.run_id for run in answer.runs}
    for run_id in dict.fromkeys(one.run_id for one in saved if one.run_id not in alive):
        runs.append(_gone_run([one for one in saved if one.run_id == run_id], name_of))
    runs.sort(key=lambda run: run["last_request_time"], reverse=True)
    page, cursor = _page(request, runs, default=20)
    return {"training_runs": page, "cursor": cursor}


async def get_training_run(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Describes one run, by its id or its model's."""
    asked = request.path_params["run_id"]
    run_id = gateway.models.run_of(asked, caller.owner)
    saved = await _checkpoints(gateway, caller, run_id)
    missing: GradwireError | None = None
    for trainer in gateway.trainers.all:
        try:
            answer = await trainer.call(trainer.runs.GetRun, GetRunRequest(run_id=run_id), caller.key)
        except GradwireError as exc:
            if exc.reason != "RUN_NOT_FOUND":
                raise
            missing = exc
        else:
            return {**_run(answer.run, saved, gateway.trainers.name_of), "training_run_id": asked}
    if saved:
        return {**_gone_run(saved, gateway.trainers.name_of), "training_run_id": asked}
    assert missing is not None, "a gateway without a trainer"
    raise missing


def _run(run: Run, saved: list[Checkpoint], name_of: Callable[[str], str]) -> dict[str, Any]:
    times = [run.created_at, *(one.created_at for one in saved)]
    return {
        "training_run_id": run.run_id,
        "base_model": name_of(run.base_model),
        "model_owner": "self",
        "is_lora": run.lora_rank > 0,
        "corrupted": run.state == RUN_STATE_LOST,
        "lora_rank": run.lora_rank or None,
        "last_request_time": max(map(_time, times)),
        "user_metadata": dict(run.user_metadata) or None,
        **_last_checkpoints(saved),
    }


def _gone_run(saved: list[Checkpoint], name_of: Callable[[str], str]) -> dict[str, Any]:
    newest = saved[0]
    return {
        "training_run_id": newest.run_id,
        "base_model": name_of(newest.base_model),
        "model_owner": "self",
        "is_lora": newest.lora_rank > 0,
        "lora_rank": newest.lora_rank or None,
        "last_request_time": _time(newest.created_at),
        **_last_checkpoints(saved),
    }


def _last_checkpoints(saved: list[Checkpoint]) -> dict[str, Any]:
    states = [one for one in saved if one.kind == CHECKPOINT_KIND_STATE]
    samplers = [one for one in saved if one.kind != CHECKPOINT_KIND_STATE]
    return {
        "last_checkpoint": _checkpoint(states[0]) if states else None,
        "last_sampler_checkpoint": _checkpoint(samplers[0]) if samplers else None,
    }


# ── checkpoints ───────────────────────────────────────────────────────────────────────────────────────────────────────


async def list_checkpoints(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Lists a run's checkpoints."""
    saved = await _checkpoints(gateway, caller, gateway.models.run_of(request.path_params["run_id"], caller.owner))
    return {"checkpoints": [_checkpoint(one) for one in saved]}


async def list_user_checkpoints(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Lists the caller's checkpoints, newest first."""
    saved = [_checkpoint(one) for one in await _checkpoints(gateway, caller)]
    page, cursor = _page(request, saved, default=100)
    return {"checkpoints": page, "cursor": cursor}


async def delete_checkpoint(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Deletes a checkpoint for good."""
    trainer, found = await _find(gateway, caller, request)
    await trainer.call(
        trainer.checkpoints.DeleteCheckpoint, checkpoints.DeleteCheckpointRequest(path=found.path), caller.key
    )
    return Response(status_code=204)


async def set_ttl(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Sets how long a checkpoint is kept from now."""
    fields = await read_fields(request)
    ttl_seconds = fields.optional_integer("ttl_seconds", low=1)
    fields.finish()
    trainer, found = await _find(gateway, caller, request)
    asked = checkpoints.SetCheckpointTtlRequest(path=found.path, ttl_seconds=ttl_seconds)
    await trainer.call(trainer.checkpoints.SetCheckpointTtl, asked, caller.key)
    return Response(status_code=204)


async def weights_info(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Tells what a checkpoint would be loaded into: base model and LoRA rank."""
    fields = await read_fields(request)
    fields.refuse("weights_access_token", "Use a key that may see the checkpoint.")
    _, found = await gateway.models.find_checkpoint(fields.text("tinker_path"), caller.key)
    fields.finish()
    info: dict[str, Any] = {
        "base_model": gateway.trainers.name_of(found.base_model),
        "is_lora": found.lora_rank > 0,
        "lora_rank": found.lora_rank or None,
    }
    if found.HasField("lora"):
        info |= {name: getattr(found.lora, name) for name in ("train_unembed", "train_mlp", "train_attn")}
    return info


async def unserved_publish(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Refuses to publish checkpoints."""
    raise unserved("Publishing a checkpoint", f"Hand its files on instead: {_DOWNLOAD}")


async def unserved_copy(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Refuses to copy a checkpoint to another owner or run."""
    raise unserved(
        "Copying a checkpoint",
        "create_training_client_from_state_with_optimizer, then save_state, makes one of your own.",
    )


async def _find(gateway: Gateway, caller: Caller, request: Request) -> tuple[Trainer, Checkpoint]:
    words = request.path_params
    return await gateway.models.find_checkpoint(f"tinker://{words['run_id']}/{words['checkpoint_id']}", caller.key)


async def _checkpoints(gateway: Gateway, caller: Caller, run_id: str = "") -> list[Checkpoint]:
    request = checkpoints.ListCheckpointsRequest(run_id=run_id)
    answers = await asyncio.gather(
        *(one.call(one.checkpoints.ListCheckpoints, request, caller.key) for one in gateway.trainers.all)
    )
    # Trainers may share a store.
    found = {one.path: one for answer in answers for one in answer.checkpoints}
    return sorted(found.values(), key=lambda one: one.created_at.ToNanoseconds(), reverse=True)


_TYPES = {paths.WEIGHTS: "training", SAMPLER_WEIGHTS: "sampler", paths.EXTERNAL_WEIGHTS: "external"}


def _checkpoint(one: Checkpoint) -> dict[str, Any]:
    checkpoint_id = paths.checkpoint_id(one.path)
    return {
        "checkpoint_id": checkpoint_id,
        "checkpoint_type": _TYPES[checkpoint_id.partition("/")[0]],
        "time": _time(one.created_at),
        "tinker_path": paths.to_tinker(one.path),
        "size_bytes": one.size_bytes,
        "public": False,
        "user_metadata": dict(one.user_metadata) or None,
        "expires_at": _time(one.expires_at) if one.HasField("expires_at") else None,
    }


# ── sessions ──────────────────────────────────────────────────────────────────────────────────────────────────────────


async def list_sessions(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Lists the caller's sessions, newest first."""
    page, _ = _page(request, [one.session_id for one in gateway.sessions.of(caller)], default=20)
    return {"sessions": page}


async def get_session(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Describes one session, and what was made in it."""
    session = gateway.sessions.find(request.path_params["session_id"], caller)
    return {
        "training_run_ids": gateway.session_models(session),
        "sampler_ids": gateway.session_samplers(session),
        "user_metadata": session.about["user_metadata"] or None,
        "display_name": session.about["display_name"] or None,
    }


async def search_sessions(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Lists the caller's sessions that match."""
    fields = await read_fields(request)
    session_id, name = fields.text("session_id", ""), fields.text("display_name", "")
    projects, metadata = fields.items("project_ids", []), fields.texts("user_metadata")
    kinds = [status.get("type") for status in fields.items("statuses", []) if isinstance(status, dict)]
    limit = fields.integer("limit", 50, low=1, high=200)
    cursor = fields.fields("cursor")
    before = (cursor.text("last_created_at", ""), cursor.text("last_session_id", ""))
    fields.ignore("owner")
    fields.finish()

    def fits(one: Session) -> bool:
        words = name.lower().split()
        named = bool(words) and all(word in one.about["display_name"].lower() for word in words)
        status = _status(one)["type"]
        return (
            (one.session_id == session_id or named or not (session_id or words))
            and (not projects or one.about["project_id"] in projects)
            and metadata.items() <= one.about["user_metadata"].items()
            and (not kinds or status in kinds)
        )

    found = [one for one in gateway.sessions.of(caller) if fits(one)]
    found.sort(key=lambda one: (_iso(one.created_s), one.session_id), reverse=True)
    if before[0]:
        found = [one for one in found if (_iso(one.created_s), one.session_id) < before]
    page = found[:limit]
    last = page[-1] if page and len(found) > limit else None
    return {
        "sessions": [
            {
                "session_id": one.session_id,
                "created_at": _iso(one.created_s),
                "owner": "self",
                "project_id": one.about["project_id"],
                "status": _status(one),
                "checkpoints_count": 0,
                "display_name": one.about["display_name"] or None,
                "user_metadata": one.about["user_metadata"] or None,
            }
            for one in page
        ],
        "next_cursor": last and {"last_created_at": _iso(last.created_s), "last_session_id": last.session_id},
    }


def _status(session: Session) -> dict[str, Any]:
    ended_by = session.ended_by
    if ended_by is None:
        return {"type": "active"}
    if ended_by["type"] != "client_finished":
        why = "its trainer job was deleted" if ended_by["type"] == "job_deleted" else "its client was silent"
        return {"type": "cancelled", "detail": why}
    return {"type": "client_finished", "reason": {"type": ended_by["reason"]}, "detail": ended_by["detail"] or None}


async def unserved_project(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Refuses projects."""
    raise unserved("Moving a session to a project", "Give project_id when the session is made.")


async def unserved_trace(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Refuses archives of sessions."""
    raise unserved("A session's trace", "`gradwire runs replay` tells of a run's operations; metrics are Prometheus'.")


async def unserved_admin(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Refuses audit logs and bills."""
    raise unserved("Audit and billing", "The trainer's log and its Prometheus metrics tell who did what.")


def _page(request: Request, found: list[Any], *, default: int) -> tuple[list[Any], dict[str, int]]:
    limit, offset = _query(request, "limit", default), _query(request, "offset", 0)
    page = found[offset : offset + min(limit, _MAX_LIMIT)]
    return page, {"offset": offset, "limit": limit, "total_count": len(found)}


def _query(request: Request, name: str, default: int) -> int:
    given = request.query_params.get(name)
    if given is None:
        return default
    if not (given.isascii() and given.isdigit() and len(given) <= 18):
        raise Refusal(400, f"{name} is {given[:40]!r}; it must be 0 or more.")
    return int(given)


def _time(stamp: Timestamp) -> str:
    return stamp.ToDatetime(UTC).isoformat()


def _iso(time_s: float) -> str:
    return datetime.fromtimestamp(math.floor(time_s * 1e6) / 1e6, UTC).isoformat(timespec="microseconds")
