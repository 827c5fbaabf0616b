"""For loops written for tinker: names that mean something else here, and names that do not exist, with the reason.

What such a loop uses has tinker's name, in the class where tinker has it; the loop runs once its import is changed.
tests/unit/sdk/test_tinker_names.py has the whole list.
"""

from typing import TYPE_CHECKING, Any

from gradwire import errors
from gradwire.errors import invalid_field

APIConnectionError = errors.UnavailableError
APIError = APIStatusError = RequestFailedError = TinkerError = errors.GradwireError
APITimeoutError = errors.OperationTimeoutError
AuthenticationError = PermissionDeniedError = errors.UnauthenticatedError
BadRequestError = UnprocessableEntityError = errors.InvalidArgumentError
ConflictError = errors.AlreadyExistsError
InternalServerError = errors.InternalError
NotFoundError = errors.NotFoundError
RateLimitError = errors.ResourceExhaustedError

NO_ACCESS_TOKENS = "a key opens its owner's checkpoints, and no others."
"""Why weights_access_token is refused."""

_CONSOLE = "there is no console; the trainer's log and its Prometheus endpoint tell what it does."
_TELEMETRY = "nothing is reported to anybody."
_SESSIONS = "there are no sessions; a run is found by its run_id, and `gradwire runs list` lists them."
_OWNERS = "runs and checkpoints belong to the key that made them and cannot be shown to others."
_COPY = "a checkpoint stays where it was saved; download it with service.checkpoints.download."
_BILLING = "nothing is billed or audited here."
_SAMPLERS = "samplers have no ids; what names one is its model_path."
_TEXT_ONLY = "only text is taken."
_ADAMW = "runs are trained with AdamW; leave it out, or pass AdamParams to optim_step."
_PROVENANCE = "no loss here reads where tokens come from; losses that need none do without."
_ITSELF = "what makes a client gives the client itself, which can be awaited and has result()."
_WIRE = "it is a message of tinker's own wire."
_HTTP = "calls go over gRPC; timeout_s and timeouts of .result() say how long to wait."

REFUSED: dict[str, dict[str, str]] = {
    "gradwire": {
        "APIResponseValidationError": "an answer that cannot be read is a GradwireError.",
        "AdamOptimizerConfig": _ADAMW,
        "AdminClient": _BILLING,
        "BackcompatSamplingClientFuture": _ITSELF,
        "BackcompatTrainingClientFuture": _ITSELF,
        "BillingError": _BILLING,
        "CheckpointType": "checkpoints are told apart by their kind.",
        "DimuonOptimizerConfig": _ADAMW,
        "DimuonParams": _ADAMW,
        "DmelChunk": _TEXT_ONLY,
        "ExperimentalWarning": "nothing here is experimental by name.",
        "ImageAssetPointerChunk": _TEXT_ONLY,
        "ImageChunk": _TEXT_ONLY,
        "LossHandle": "no code of callers runs on the trainer; pass the loss to forward_backward_custom.",
        "ModelID": "a run's id is a str.",
        "OptimStepRequest": _WIRE,
        "ParsedCheckpointTinkerPath": "a path is gradwire://<run_id>/<kind>/<name>.",
        "PerDatumLossFn": "no code of callers runs on the trainer; pass the loss to forward_backward_custom.",
        "PromptProvenanceSpan": _PROVENANCE,
        "RequestOptions": _HTTP,
        "SampleRequest": _WIRE,
        "SampledProvenanceSpan": _PROVENANCE,
        "Timeout": _HTTP,
        "auth": "the key is api_key, or GRADWIRE_API_KEY.",
    },
    "ServiceClient": {
        "copy_weights": _COPY,
        "create_custom_loss": "no code of callers runs on the trainer; forward_backward_custom takes any loss, for the "
        "price of one forward, and --loss-module adds losses of the trainer's owner.",
        "get_console_url": _CONSOLE,
        "get_telemetry": _TELEMETRY,
        "holder": "it is tinker's own.",
    },
    "TrainingClient": {
        "get_console_url": _CONSOLE,
        "get_telemetry": _TELEMETRY,
        "save_weights_external": "save_weights_for_sampler writes a Hugging Face or peft folder, which "
        "service.checkpoints.export fetches.",
    },
    "SamplingClient": {
        "create": "ServiceClient.create_sampling_client makes one.",
        "from_sampler_handle": "ServiceClient.create_sampling_client(model_path) makes another client of a checkpoint.",
        "get_sampler_handle": "its model_path names what it samples from.",
        "get_telemetry": _TELEMETRY,
        "on_queue_state_change": "nobody calls back; a sample waits for its turn.",
    },
    "RestClient": {
        "assign_session_project": _SESSIONS,
        "copy_weights": _COPY,
        "export_session_trace": _SESSIONS,
        "get_audit_log": _BILLING,
        "get_billing_usage": _BILLING,
        "get_current_checkpoint_storage_usage": "list_user_checkpoints says the size of each.",
        "get_external_weights_urls": "service.checkpoints.download and .export fetch a checkpoint's files.",
        "get_sampler": _SAMPLERS,
        "get_session": _SESSIONS,
        "get_telemetry": _TELEMETRY,
        "list_sessions": _SESSIONS,
        "publish_checkpoint_from_tinker_path": _OWNERS,
        "search_sessions": _SESSIONS,
        "unpublish_checkpoint_from_tinker_path": _OWNERS,
        "whoami": "the trainer's owner knows keys by name; see --api-key-file.",
    },
}
"""By class, or package: what tinker has and Gradwire does not, and why, or what to use instead. An …_async twin goes
with its call."""


def missing(where: str, name: str, owner: object) -> AttributeError:
    """What to raise for a name that is not there: with the reason, if tinker has it."""
    why = REFUSED.get(where, {}).get(name.removesuffix("_async"))
    return AttributeError(f"{where} has no {name}{f': {why}' if why else '.'}", name=name, obj=owner)


class RefusesTinkerNames:
    """Says of a name in REFUSED why there is none; hasattr is False as for any other."""

    if not TYPE_CHECKING:  # Else editors would take any name for one of the class's.

        def __getattr__(self, name: str) -> Any:
            raise missing(type(self).__name__, name, self)


def refuse_given(why: str, **given: Any) -> None:
    """Refuses arguments of tinker's that cannot mean anything here, unless they are left at None, False or 0.

    Raises:
        InvalidArgumentError: INVALID_FIELD: names the argument, and why.
    """
    for name, value in given.items():
        if value is not None and value is not False and value != 0:
            raise invalid_field(name, f"is {value!r:.80}; leave it out: {why}")


def refuse_other_optimizer(where: str, optimizer: Any) -> None:
    """Refuses settings, by their `type`, of an optimizer that is not AdamW.

    Raises:
        InvalidArgumentError: INVALID_FIELD.
    """
    kind = getattr(optimizer, "type", "adamw")
    if kind != "adamw":
        raise invalid_field(where, f"is of the optimizer {str(kind)[:80]!r}; runs are trained with AdamW.")
