"""All endpoints of the gateway."""

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from trainer_service.gateway import downloads_api, fireworks_api, openai_api, rest_api, sampling_api, training_api
from trainer_service.gateway.endpoints import Handler, route, tinker_refusal
from trainer_service.gateway.gateway import Gateway
from trainer_service.gateway.outcomes import Refusal
from trainer_service.gateway.request_translation import JSON_KINDS

_FILES = "external_files/{token}/{file:path}"
_KEYLESS = {"healthz", _FILES}
"""Open to everybody: probes have no key, and a file's URL has a token in it."""
_TINKER: tuple[tuple[str, str, Handler], ...] = (
    ("POST", "retrieve_future", training_api.retrieve_future),
    ("POST", "asample", sampling_api.asample),
    ("POST", "forward_backward", training_api.forward_backward),
    ("POST", "optim_step", training_api.json_operation),
    ("POST", "retrieve_futures", sampling_api.retrieve_futures),
    ("POST", "client/config", training_api.client_config),
    ("POST", "client/dynamic_config", training_api.dynamic_config),
    ("POST", "create_session", training_api.create_session),
    ("POST", "session_heartbeat", training_api.session_heartbeat),
    ("POST", "sessions/search", rest_api.search_sessions),
    ("POST", "sessions/{session_id}/finish", training_api.finish_session),
    ("POST", "telemetry", training_api.telemetry),
    ("POST", "create_model", training_api.create_model),
    ("POST", "get_info", training_api.get_info),
    ("POST", "load_weights", training_api.load_weights),
    *(("POST", kind, training_api.json_operation) for kind in JSON_KINDS if kind not in ("load_weights", "optim_step")),
    ("POST", "cancel_future", training_api.cancel_future),
    ("POST", "create_custom_loss", training_api.unserved_custom_loss),
    ("POST", "create_sampling_session", sampling_api.create_sampling_session),
    ("GET", "samplers/{sampler_id}", sampling_api.get_sampler),
    ("GET", "get_server_capabilities", rest_api.get_server_capabilities),
    ("GET", "healthz", rest_api.healthz),
    ("GET", "auth/apikey/me", rest_api.api_key),
    ("DELETE", "auth/apikey/me", rest_api.delete_api_key),
    ("GET", "training_runs", rest_api.list_training_runs),
    ("GET", "training_runs/{run_id}", rest_api.get_training_run),
    ("GET", "training_runs/{run_id}/checkpoints", rest_api.list_checkpoints),
    ("POST", "training_runs/{run_id}/checkpoints/{checkpoint_id:path}/publish", rest_api.unserved_publish),
    ("DELETE", "training_runs/{run_id}/checkpoints/{checkpoint_id:path}/publish", rest_api.unserved_publish),
    ("PUT", "training_runs/{run_id}/checkpoints/{checkpoint_id:path}/ttl", rest_api.set_ttl),
    (
        "GET",
        "training_runs/{run_id}/checkpoints/{checkpoint_id:path}/external_weights_urls",
        downloads_api.external_weights_urls,
    ),
    ("GET", _FILES, downloads_api.external_file),
    ("DELETE", "training_runs/{run_id}/checkpoints/{checkpoint_id:path}", rest_api.delete_checkpoint),
    ("GET", "checkpoints", rest_api.list_user_checkpoints),
    ("POST", "weights_info", rest_api.weights_info),
    ("POST", "copy_weights", rest_api.unserved_copy),
    ("GET", "sessions", rest_api.list_sessions),
    ("GET", "sessions/{session_id}", rest_api.get_session),
    ("PUT", "sessions/{session_id}/project", rest_api.unserved_project),
    ("GET", "sessions/{session_id}/trace_export", rest_api.unserved_trace),
    ("GET", "audit", rest_api.unserved_admin),
    ("GET", "billing/usage/events", rest_api.unserved_admin),
    ("GET", "billing/usage/checkpoints/current", rest_api.unserved_admin),
)

_OPENAI: tuple[tuple[str, str, Handler], ...] = (
    ("GET", "models", openai_api.models),
    ("GET", "models/{model:path}", openai_api.model),
    ("POST", "completions", openai_api.completions),
    ("POST", "chat/completions", openai_api.chat_completions),
)

_JOBS = "/v1/accounts/{account}/rlorTrainerJobs"
_IN_JOB = "/training/v1/rlorTrainerJobs/{account}/{job_id}/api/v1"
_FIREWORKS: tuple[tuple[str, str, Handler], ...] = (
    ("GET", "/v1/accounts", fireworks_api.list_accounts),
    ("POST", _JOBS, fireworks_api.create_job),
    ("GET", _JOBS, fireworks_api.list_jobs),
    ("GET", f"{_JOBS}/{{job_id}}", fireworks_api.get_job),
    ("DELETE", f"{_JOBS}/{{job_id}}", fireworks_api.delete_job),
    ("POST", f"{_JOBS}/{{job_id}}:resume", fireworks_api.resume_job),
)
_OF_JOBS: dict[tuple[str, str], Handler] = {
    ("POST", "create_session"): fireworks_api.create_session,
    ("POST", "forward"): fireworks_api.forward,
    ("POST", "forward_backward"): fireworks_api.forward_backward,
    ("POST", "unload_model"): fireworks_api.unload_model,
}
"""Endpoints below a job that differ from those of tinker's SDK."""


def make_app(gateway: Gateway) -> ASGIApp:
    """The gateway as an application for an ASGI server."""
    routes: list[Route] = [
        route(f"/api/v1/{path}", handler, gateway, method=method, keyless=path in _KEYLESS)
        for method, path, handler in _TINKER
    ]
    routes += [route(path, handler, gateway, method=method) for method, path, handler in _FIREWORKS]
    in_job = {(method, path): handler for method, path, handler in _TINKER} | _OF_JOBS
    routes += [
        route(f"{_IN_JOB}/{path}", fireworks_api.in_job(handler), gateway, method=method)
        for (method, path), handler in in_job.items()
    ]
    routes.append(route("/metrics", rest_api.metrics, gateway, method="GET"))
    routes += [
        route(f"/oai/api/v1/{path}", handler, gateway, method=method, on_refusal=openai_api.openai_refusal)
        for method, path, handler in _OPENAI
    ]
    others: list[BaseRoute] = [*routes]
    app = Starlette(routes=others, exception_handlers={404: _unknown, 405: _unknown})
    # Starlette tries one path's pattern after the other; what is asked for thousands of times has no pattern in it.
    fixed = {(method, one.path): one.app for one in routes if "{" not in one.path for method in one.methods or ()}

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await fixed.get((scope.get("method", ""), scope.get("path", "")), app)(scope, receive, send)

    return answer


async def _unknown(request: Request, exc: Exception) -> Response:
    text = f"{request.method} {request.url.path[:200]} is not served by this gateway."
    return tinker_refusal(Refusal(404, text, reason="NOT_IMPLEMENTED"))
