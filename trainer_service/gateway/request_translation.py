"""Between a model's operations on tinker's wire and a run's: what goes up, and what comes back."""

from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import DecodeError
from gradwire._wire.codec import Batch, batch_message
from gradwire.v1 import operation_pb2 as ops
from gradwire.v1.checkpoint_pb2 import CHECKPOINT_TYPE_BASE, CHECKPOINT_TYPE_DELTA

from trainer_service.gateway import paths
from trainer_service.gateway.bodies import Fields, parse_fields
from trainer_service.gateway.json_passes import read_json_pass
from trainer_service.gateway.outcomes import Refusal, unserved
from trainer_service.gateway.wire import tinker_wire_pb2 as wire

FORWARD_BACKWARD = "forward_backward"
"""Kind of the protobuf operation, forwards too."""
CUSTOM = "forward_backward_custom"
"""Kind of the same one where it is, or may be, one of the two passes of a custom loss."""

FORWARD_JSON, FORWARD_BACKWARD_JSON = "forward_json", "forward_backward_json"
"""Kinds of passes of Fireworks' SDK, which does not say whether they are of a custom loss."""
_JSON_ARMS = {FORWARD_JSON: "forward_input", FORWARD_BACKWARD_JSON: "forward_backward_input"}
PASSES = (FORWARD_BACKWARD, CUSTOM, *_JSON_ARMS)
"""Kinds of passes through the model."""


@dataclass(frozen=True)
class Planned:
    """One operation as the run gets it.

    Attributes:
        kind: Name of TrainRequest's arm.
        content: Its message.
        plan: What its answer is translated with; JSON.
        steps: Whether what was kept of forwards is of no use behind it.
    """

    kind: str
    content: Any
    plan: dict[str, Any] = field(default_factory=dict)
    steps: bool = False


def parse_pass(body: bytes) -> wire.ForwardBackwardRequest:
    """A forward_backward request.

    Raises:
        Refusal: The body is none.
    """
    try:
        return wire.ForwardBackwardRequest.FromString(body)
    except DecodeError:
        raise Refusal(400, "The body is not the protobuf message of forward_backward.") from None


def read_pass(kind: str, body: bytes) -> wire.ForwardBackwardRequest:
    """The request of an operation that is a pass.

    Raises:
        Refusal: The body is none.
    """
    if (arm := _JSON_ARMS.get(kind)) is not None:
        return read_json_pass(parse_fields(body), arm)
    return parse_pass(body)


def plan_pass(request: wire.ForwardBackwardRequest, batch: Batch) -> Planned:
    """A forward, or a forward and backward, with a built-in loss."""
    config = _loss_config(request)
    if request.loss_fn == "stable_reinforce":
        raise unserved("The loss stable_reinforce", "Its formula is not published; use importance_sampling or ppo.")
    if request.loss_fn == "custom":
        raise unserved("A loss that runs on the server", "forward_backward_custom runs it in your process.")
    message, kind = (
        (ops.ForwardRequest, "forward") if request.forward_only else (ops.ForwardBackwardRequest, "forward_backward")
    )
    content = message(batch=batch_message(batch), loss_fn=request.loss_fn, loss_fn_config=config)
    return Planned(kind, content, {"as": "pass"})


def _loss_config(request: wire.ForwardBackwardRequest) -> dict[str, float]:
    config = dict(request.loss_fn_config)
    for name, value in request.loss_fn_config_v2.items():
        if value.WhichOneof("value") != "number":
            raise Refusal(400, f'loss_fn_config["{name[:80]}"] is no number; the losses here take numbers alone.')
        config[name] = value.number
    return config


def plan_json(kind: str, body: bytes, run_of: Any) -> Planned:
    """An operation whose body is JSON.

    Args:
        kind: Its name on the wire.
        body: The body.
        run_of: As in paths.to_gradwire.

    Raises:
        Refusal: It cannot be done.
    """
    fields = parse_fields(body)
    fields.ignore("model_id", "type")
    seq_id = fields.integer("seq_id", 0)
    planned = _PLANS[kind](fields, seq_id, run_of)
    fields.finish()
    return planned


def _optim_step(fields: Fields, seq_id: int, run_of: Any) -> Planned:
    if fields.has("optimizer_params"):
        kind = fields.fields("optimizer_params").value("type")
        raise unserved(f"The optimizer {str(kind)[:40]!r}", "Use AdamParams; AdamW is what there is.")
    params = fields.fields("adam_params")
    names = ("learning_rate", "beta1", "beta2", "eps", "weight_decay", "grad_clip_norm")
    given = {name: value for name in names if (value := params.optional_number(name)) is not None}
    normalization = _NORMALIZATIONS.get(fields.text("grad_accumulation_normalization", "none"))
    if normalization is None:
        raise fields.wrong("grad_accumulation_normalization", f"is not one of {', '.join(_NORMALIZATIONS)}.")
    params.refuse(
        "emit_grad_norm_metrics",
        "Every step tells the norm of all gradients; those of parts are not kept.",
        unless=lambda mode: mode in (False, True, "off", "basic"),
    )
    params.finish()
    content = ops.OptimStepRequest(grad_accumulation_normalization=normalization)
    for name, value in given.items():
        setattr(content, name, value)
    return Planned("optim_step", content, {"as": "optim_step"}, steps=True)


_NORMALIZATIONS = {
    "none": ops.GRAD_ACCUMULATION_NORMALIZATION_UNSPECIFIED,
    "num_loss_tokens": ops.GRAD_ACCUMULATION_NORMALIZATION_NUM_LOSS_TOKENS,
    "num_sequences": ops.GRAD_ACCUMULATION_NORMALIZATION_NUM_SEQUENCES,
}


def _save_weights(fields: Fields, seq_id: int, run_of: Any) -> Planned:
    content = ops.SaveStateRequest(
        name=fields.text("path", f"seq-{seq_id}"),
        overwrite=fields.flag("overwrite"),
        user_metadata=fields.texts("user_metadata"),
        ttl_seconds=fields.optional_integer("ttl_seconds", low=1),
    )
    return Planned("save_state", content, {"as": "state"})


def _save_weights_for_sampler(fields: Fields, seq_id: int, run_of: Any) -> Planned:
    kind = fields.text("kind", "snapshot")
    if kind not in ("snapshot", "inflight"):
        raise fields.wrong("kind", f"is {kind[:40]!r}; it must be snapshot or inflight.")
    number = fields.optional_integer("sampling_session_seq_id", low=0)
    ttl_seconds = fields.optional_integer("ttl_seconds", low=1)
    user_metadata = fields.texts("user_metadata")
    if fields.has("path") or number is None:
        content = ops.SaveWeightsForSamplerRequest(
            name=fields.text("path", f"seq-{seq_id}"),
            # The wire has no flag for it, so a name that comes again can only mean the newest.
            overwrite=True,
            ttl_seconds=ttl_seconds,
            user_metadata=user_metadata,
        )
        _set_checkpoint_type(content, fields)
        return Planned("save_weights_for_sampler", content, {"as": "weights"})
    fields.drop("path")
    content = ops.SaveWeightsForSamplerRequest(ephemeral=True)
    return Planned("save_weights_for_sampler", content, {"as": "sampler", "number": number})


def _set_checkpoint_type(content: ops.SaveWeightsForSamplerRequest, fields: Fields) -> None:
    """What Fireworks' SDK says of what is written."""
    kind = fields.text("checkpoint_type", "base")
    if kind not in ("base", "delta", "merged_base"):
        raise fields.wrong("checkpoint_type", f"is {kind[:40]!r}; it must be base, delta or merged_base.")
    content.checkpoint_type = CHECKPOINT_TYPE_DELTA if kind == "delta" else CHECKPOINT_TYPE_BASE
    content.merged = kind == "merged_base"
    precisions = {"source": "", "bf16": "bfloat16"}
    precision = fields.text("export_precision", "source")
    if precision not in precisions:
        raise unserved(f"export_precision {precision[:40]!r}", f"Here it is one of {', '.join(precisions)}.")
    content.dtype = precisions[precision]
    fields.refuse("metadata", "It would be kept and not used; leave it out.")


def _save_weights_external(fields: Fields, seq_id: int, run_of: Any) -> Planned:
    fields.refuse("age_encryption_recipients", "Serve over HTTPS (--tls-cert-file), and encrypt what you fetched.")
    content = ops.SaveWeightsForSamplerRequest(
        name=paths.external_name(fields.text("path", f"seq-{seq_id}")),
        # As for samplers.
        overwrite=True,
        ttl_seconds=fields.optional_integer("ttl_seconds", low=1),
    )
    return Planned("save_weights_for_sampler", content, {"as": "external"})


def _load_weights(fields: Fields, seq_id: int, run_of: Any) -> Planned:
    fields.refuse("weights_access_token", "Use a key that may see the checkpoint.")
    content = ops.LoadStateRequest(
        path=paths.to_gradwire(fields.text("path"), run_of), with_optimizer=fields.flag("optimizer")
    )
    return Planned("load_state", content, {"as": "load", "path": paths.to_tinker(content.path)}, steps=True)


_PLANS = {
    "optim_step": _optim_step,
    "save_weights": _save_weights,
    "save_weights_for_sampler": _save_weights_for_sampler,
    "save_weights_external": _save_weights_external,
    "load_weights": _load_weights,
}
JSON_KINDS = tuple(_PLANS)
"""Operations whose body is JSON."""


def filler(kind: str, body: bytes) -> Planned:
    """What uses a number up in the place of an operation that was refused. Where gradients were to be added, the step
    behind it is refused as after any failed pass, instead of applying what there is."""
    taint = kind in PASSES and not _forward_only(kind, body)
    return Planned("cancel", ops.CancelRequest(taint=taint))


def _forward_only(kind: str, body: bytes) -> bool:
    if kind in _JSON_ARMS:
        return kind == FORWARD_JSON
    try:
        return parse_pass(body).forward_only
    except Refusal:
        return False
