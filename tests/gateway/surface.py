"""Every public call of tinker's SDK, tried through the gateway; docs/compatibility.md is what came of it."""

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tinker
from tinker import types
from tinker.lib.public_interfaces.admin_client import AdminClient

from tests.gateway.data import TOKENS, make_data

CLASSES: tuple[type, ...] = (
    tinker.ServiceClient,
    tinker.TrainingClient,
    tinker.SamplingClient,
    tinker.RestClient,
    AdminClient,
)
NOT_SERVED = "is not served by this gateway. "
PROMPT = types.ModelInput.from_ints(TOKENS[:3])
PARAMS = types.SamplingParams(max_tokens=2)
ADAM = types.AdamParams(learning_rate=1e-3)


@dataclass
class World:
    """What calls are tried on."""

    service: tinker.ServiceClient
    client: tinker.TrainingClient
    sampler: tinker.SamplingClient
    rest: tinker.RestClient
    admin: Any
    base_model: str
    session_id: str
    run_id: str
    state: str
    weights: str

    def saved(self) -> str:
        """A checkpoint that may go."""
        return self.client.save_state(f"s-{time.monotonic_ns()}").result().path


def _loss(data: Any, logprobs: Any) -> Any:
    return sum(one.sum() for one in logprobs), {}


def _forward_backward(world: World) -> Any:
    passed = world.client.forward_backward(make_data(), "cross_entropy")
    return passed.result(), world.client.optim_step(ADAM).result()


def _search(world: World) -> Any:
    from tinker.types.session_search_request import SessionSearchRequest

    found = world.rest.search_sessions(SessionSearchRequest(session_id=world.session_id)).result()
    assert [one.session_id for one in found.sessions] == [world.session_id]
    return found


PROBES: dict[str, Callable[[World], Any]] = {
    "ServiceClient.close": lambda w: None,  # Tried last, by the test.
    "ServiceClient.copy_weights": lambda w: w.service.copy_weights(w.state).result(),
    "ServiceClient.create_custom_loss": lambda w: w.service.create_custom_loss(_traceable, {"logprobs": 1}).result(),
    "ServiceClient.create_lora_training_client": lambda w: w.service.create_lora_training_client(
        w.base_model, rank=2
    ).result(),
    "ServiceClient.create_rest_client": lambda w: w.service.create_rest_client(),
    "ServiceClient.create_sampling_client": lambda w: w.service.create_sampling_client(
        base_model=w.base_model
    ).result(),
    "ServiceClient.create_training_client_from_state": lambda w: w.service.create_training_client_from_state(
        w.state
    ).result(),
    "ServiceClient.create_training_client_from_state_with_optimizer": (
        lambda w: w.service.create_training_client_from_state_with_optimizer(w.state).result()
    ),
    "ServiceClient.get_console_url": lambda w: w.service.get_console_url(),
    "ServiceClient.get_server_capabilities": lambda w: w.service.get_server_capabilities(),
    "ServiceClient.get_telemetry": lambda w: w.service.get_telemetry(),
    "TrainingClient.create_sampling_client": lambda w: w.client.create_sampling_client(w.weights).result(),
    "TrainingClient.forward": lambda w: w.client.forward(make_data(), "cross_entropy").result(),
    "TrainingClient.forward_backward": _forward_backward,
    "TrainingClient.forward_backward_custom": lambda w: w.client.forward_backward_custom(make_data(), _loss).result(),
    "TrainingClient.get_console_url": lambda w: w.client.get_console_url(),
    "TrainingClient.get_info": lambda w: w.client.get_info(),
    "TrainingClient.get_telemetry": lambda w: w.client.get_telemetry(),
    "TrainingClient.get_tokenizer": lambda w: w.client.get_tokenizer(),
    "TrainingClient.load_state": lambda w: w.client.load_state(w.state).result(),
    "TrainingClient.load_state_with_optimizer": lambda w: w.client.load_state_with_optimizer(w.state).result(),
    "TrainingClient.optim_step": _forward_backward,
    "TrainingClient.save_state": lambda w: w.client.save_state(
        "again", ttl_seconds=3600, overwrite=True, user_metadata={"a": "b"}
    ).result(),
    "TrainingClient.save_weights_and_get_sampling_client": (
        lambda w: w.client.save_weights_and_get_sampling_client(kind="inflight").result()
    ),
    "TrainingClient.save_weights_external": lambda w: w.client.save_weights_external("away").result(),
    "TrainingClient.save_weights_for_sampler": lambda w: w.client.save_weights_for_sampler(
        "again", ttl_seconds=3600
    ).result(),
    "SamplingClient.compute_logprobs": lambda w: w.sampler.compute_logprobs(PROMPT).result(),
    "SamplingClient.create": lambda w: w.service.create_sampling_client(base_model=w.base_model).result(),
    "SamplingClient.from_sampler_handle": lambda w: w.sampler.get_sampler_handle(),
    "SamplingClient.get_base_model": lambda w: w.sampler.get_base_model(),
    "SamplingClient.get_sampler_handle": lambda w: w.sampler.get_sampler_handle(),
    "SamplingClient.get_telemetry": lambda w: w.sampler.get_telemetry(),
    "SamplingClient.get_tokenizer": lambda w: w.sampler.get_tokenizer(),
    "SamplingClient.on_queue_state_change": lambda w: None,
    "SamplingClient.sample": lambda w: w.sampler.sample(
        PROMPT, 2, PARAMS, include_prompt_logprobs=True, topk_prompt_logprobs=2, topk_sample_logprobs=2
    ).result(),
    "RestClient.assign_session_project": lambda w: w.rest.assign_session_project(w.session_id, "p").result(),
    "RestClient.copy_weights": lambda w: w.rest.copy_weights(w.state, "p").result(),
    "RestClient.delete_checkpoint": lambda w: w.rest.delete_checkpoint(
        w.run_id, w.saved().partition(f"{w.run_id}/")[2]
    ).result(),
    "RestClient.delete_checkpoint_from_tinker_path": lambda w: w.rest.delete_checkpoint_from_tinker_path(
        w.saved()
    ).result(),
    "RestClient.export_session_trace": lambda w: w.rest.export_session_trace(w.session_id).result(),
    "RestClient.get_audit_log": lambda w: w.rest.get_audit_log().result(),
    "RestClient.get_billing_usage": lambda w: w.rest.get_billing_usage(_day(1), _day(2)).result(),
    "RestClient.get_current_checkpoint_storage_usage": (
        lambda w: w.rest.get_current_checkpoint_storage_usage().result()
    ),
    "RestClient.get_external_weights_urls": lambda w: w.rest.get_external_weights_urls(
        w.client.save_weights_external("files").result().path
    ).result(),
    "RestClient.get_sampler": lambda w: w.rest.get_sampler(_sampler_id(w)).result(),
    "RestClient.get_server_capabilities": lambda w: w.rest.get_server_capabilities().result(),
    "RestClient.get_session": lambda w: w.rest.get_session(w.session_id).result(),
    "RestClient.get_telemetry": lambda w: w.rest.get_telemetry(),
    "RestClient.get_training_run": lambda w: w.rest.get_training_run(w.run_id).result(),
    "RestClient.get_training_run_by_tinker_path": lambda w: w.rest.get_training_run_by_tinker_path(w.state).result(),
    "RestClient.get_weights_info_by_tinker_path": lambda w: w.rest.get_weights_info_by_tinker_path(w.state).result(),
    "RestClient.list_checkpoints": lambda w: w.rest.list_checkpoints(w.run_id).result(),
    "RestClient.list_sessions": lambda w: w.rest.list_sessions().result(),
    "RestClient.list_training_runs": lambda w: w.rest.list_training_runs().result(),
    "RestClient.list_user_checkpoints": lambda w: w.rest.list_user_checkpoints().result(),
    "RestClient.publish_checkpoint_from_tinker_path": (
        lambda w: w.rest.publish_checkpoint_from_tinker_path(w.state).result()
    ),
    "RestClient.search_sessions": _search,
    "RestClient.set_checkpoint_ttl_from_tinker_path": lambda w: w.rest.set_checkpoint_ttl_from_tinker_path(
        w.saved(), 3600
    ).result(),
    "RestClient.unpublish_checkpoint_from_tinker_path": (
        lambda w: w.rest.unpublish_checkpoint_from_tinker_path(w.state).result()
    ),
    "AdminClient.get_audit_log": lambda w: w.admin.get_audit_log().result(),
    "AdminClient.get_billing_usage": lambda w: w.admin.get_billing_usage(_day(1), _day(2)).result(),
    "AdminClient.get_current_checkpoint_storage_usage": (
        lambda w: w.admin.get_current_checkpoint_storage_usage().result()
    ),
    "AdminClient.get_telemetry": lambda w: w.admin.get_telemetry(),
}
"""By class and method; each raises, or not."""


ELSEWHERE: dict[str, tuple[Callable[[World], Any], str]] = {
    "RestClient.whoami": (
        lambda w: w.rest.whoami().result(),
        "It reads a token of the hosted service in your own process; a key of a trainer says nothing of its owner.",
    ),
}
"""Calls that cannot work whatever a server does: what is tried, and why."""


def _sampler_id(world: World) -> str:
    return world.sampler._sampling_session_id  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]


def _day(number: int) -> Any:
    import datetime

    return datetime.datetime(2026, 1, number, tzinfo=datetime.UTC)


def _traceable(logprobs: Any) -> Any:
    return -logprobs.sum(), {}


def public_calls() -> list[str]:
    """Every public method of the SDK's clients. A deprecated `…_async` twin goes with its like."""
    found: list[str] = []
    for owner in CLASSES:
        names = [name for name in vars(owner) if not name.startswith("_")]
        for name in sorted(names):
            member = inspect.getattr_static(owner, name)
            if isinstance(member, property) or not callable(getattr(owner, name)):
                continue
            if name.endswith("_async") and name.removesuffix("_async") in names:
                continue
            found.append(f"{owner.__name__}.{name}")
    return found


def attempt(probe: Callable[[World], Any], world: World) -> str:
    """ "yes", or what the gateway says of why not.

    Raises:
        Exception: It failed in another way.
    """
    try:
        probe(world)
    except Exception as exc:
        # The SDK adds which request it was of.
        text = str(exc).partition(" for self.request_id=")[0]
        if NOT_SERVED not in text:
            raise
        instead = text.partition(NOT_SERVED)[2]
        for end in ('","', "\", '", "', '", "' with status", " (status"):
            instead = instead.partition(end)[0]
        return instead.strip().strip("'\"")
    return "yes"


def table(results: dict[str, str]) -> str:
    """docs/compatibility.md's part that is generated."""
    rows = ["| tinker 0.38 | served | instead |", "|---|---|---|"]
    for name, result in results.items():
        rows.append(f"| `{name}` | {'yes' if result == 'yes' else 'no'} | {'' if result == 'yes' else result} |")
    return "\n".join(rows) + "\n"
