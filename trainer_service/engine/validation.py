"""Refuses invalid contents of operations, and names the place as the caller wrote it. numpy only.

Runs ahead of the device, on the thread that reads commands. The form (dtypes, equal lengths) is checked when a message
is decoded (gradwire._wire.codec); here it is about contents.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from gradwire._wire.arguments import check_number
from gradwire._wire.codec import Batch
from gradwire.errors import GradwireError, error, invalid_field

from trainer_service.config import Limits
from trainer_service.engine.losses.loss import Loss


def check_batch(
    batch: Batch, *, vocab_size: int, max_context_length: int, limits: Limits, loss: Loss | None = None
) -> None:
    """Checks sequences, targets and, if a loss is evaluated, its inputs.

    Raises:
        InvalidArgumentError: SEQUENCE_TOO_LONG or INVALID_FIELD, with the datum's path.
        ResourceExhaustedError: LIMIT_EXCEEDED.
    """
    _check_size(batch, limits)
    lengths = np.diff(batch.cu_seqlens)
    if lengths.max() > max_context_length:
        number = int(np.argmax(lengths > max_context_length))
        raise invalid_field(
            f"{batch.datum_path(number)}.model_input",
            f"has {lengths[number]} tokens, but this trainer takes at most {max_context_length} per sequence; shorten "
            "it, or start a trainer with a larger max_context_length if the model can take it.",
            reason="SEQUENCE_TOO_LONG",
            limit=max_context_length,
            got=lengths[number],
        )
    _check_token_ids(batch, batch.tokens_T, "model_input.tokens", vocab_size)
    targets = batch.loss_fn_inputs.get("target_tokens")
    if targets is None:
        raise invalid_field(
            batch.input_path(0, "target_tokens"), "is missing; every datum needs the token to predict at each position."
        )
    if targets.ndim == 2 and targets.shape[1] == 0:
        where = batch.input_path(0, "target_tokens")
        raise invalid_field(where, "has shape [N, 0]; it must have a target for each token.")
    _check_token_ids(batch, targets, 'loss_fn_inputs["target_tokens"]', vocab_size)
    if loss is not None:
        _check_loss_inputs(batch, loss, targets.shape)


def check_loss_config(loss: Loss, config: Mapping[str, float]) -> None:
    """Refuses keys that the loss does not know, values that are not numbers or contradict each other, and missing keys.

    Raises:
        InvalidArgumentError: INVALID_FIELD, listing the known keys.
    """
    known = ", ".join(_with_default(key, default) for key, default in loss.config.items()) or "none"
    for key, value in config.items():
        where = f'loss_fn_config["{key}"]'
        if key not in loss.config:
            raise invalid_field(where, f"is not a setting of {loss.name}; known: {known}.", known=known)
        check_number(where, value)
    settings = loss.settings(config)
    for key in loss.config:
        if key not in settings:
            advice = f"; {loss.advice}" if loss.advice else ""
            text = f"is missing; {loss.name} has no default for it. Its settings: {known}{advice}."
            raise invalid_field(f'loss_fn_config["{key}"]', text, known=known)
    loss.check_config(settings)


def check_gradients(gradients: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Gradients of a custom loss; their shape is compared with the held graph's later, in their turn.

    Raises:
        InvalidArgumentError: INVALID_FIELD: not float32, or NaN or infinite.
    """
    if gradients.dtype != np.float32:
        raise invalid_field("gradients", f"has dtype {gradients.dtype}; it must be float32.")
    finite = np.isfinite(gradients)
    if not finite.all():
        place = tuple(int(i) for i in np.argwhere(~finite)[0])
        raise invalid_field(
            "gradients" + "".join(f"[{i}]" for i in place), f"is {gradients[place]}; gradients must be finite."
        )
    return gradients


def check_gradients_shape(gradients: npt.NDArray[Any], shape: Sequence[int], forward_seq_id: int) -> None:
    """Refuses gradients that do not have the shape of their logprobs.

    Raises:
        InvalidArgumentError: INVALID_FIELD.
    """
    if tuple(gradients.shape) != tuple(shape):
        raise invalid_field(
            "gradients",
            f"has shape {list(gradients.shape)}, but the logprobs of forward {forward_seq_id} have shape "
            f"{list(shape)}; they must match.",
        )


def _check_size(batch: Batch, limits: Limits) -> None:
    for what, got, limit in (
        ("sequences", batch.num_sequences, limits.max_datums),
        ("tokens", batch.num_tokens, limits.max_tokens),
    ):
        if got > limit:
            raise error(
                "LIMIT_EXCEEDED",
                f"data has {got} {what}, but one operation takes at most {limit}; send it in several calls, their "
                "gradients add up.",
                limit=limit,
                got=got,
            )


def _check_token_ids(batch: Batch, ids: npt.NDArray[Any], name: str, vocab_size: int) -> None:
    # Two reductions and no mask: this runs over every token of every batch.
    if ids.min() >= 0 and ids.max() < vocab_size:
        return
    raise _at(
        batch,
        (ids < 0) | (ids >= vocab_size),
        ids,
        name,
        f"which is not in the vocabulary of {vocab_size} token ids, 0 to {vocab_size - 1}.",
    )


def _check_loss_inputs(batch: Batch, loss: Loss, shape: tuple[int, ...]) -> None:
    known = ("target_tokens", *loss.inputs)
    if len(shape) == 2 and not loss.soft_targets:
        raise invalid_field(
            batch.input_path(0, "target_tokens"),
            f"has {_per_token(shape)}, but {loss.name} takes one target per token (shape [N]).",
        )
    for name in batch.loss_fn_inputs:
        if name not in known:
            raise invalid_field(
                batch.input_path(0, name),
                f"is not an input of {loss.name}, which reads {', '.join(known)}; leave it out.",
            )
    for name in loss.inputs:
        values = batch.loss_fn_inputs.get(name)
        if values is None:
            raise invalid_field(batch.input_path(0, name), f"is missing; {loss.name} reads {', '.join(known)}.")
        if values.shape != shape:
            raise invalid_field(
                batch.input_path(0, name),
                f"has {_per_token(values.shape)}, but target_tokens has {_per_token(shape)}; they must match.",
            )
        finite = np.isfinite(values)
        if not finite.all():
            raise _at(batch, ~finite, values, f'loss_fn_inputs["{name}"]', "which is not finite.")
    loss.check_inputs(batch)


def _with_default(key: str, default: float | None) -> str:
    return f"{key} (required)" if default is None else f"{key} (default {default:g})"


def _per_token(shape: tuple[int, ...]) -> str:
    if len(shape) == 2:
        return f"{shape[1]} values per token (shape [N, {shape[1]}])"
    return "one value per token (shape [N])"


def _at(batch: Batch, bad: npt.NDArray[np.bool_], values: npt.NDArray[Any], name: str, why: str) -> GradwireError:
    """The error about the first bad element, with its place inside its datum."""
    place = tuple(int(i) for i in np.argwhere(bad)[0])
    number, row = batch.place(place[0])
    inside = "".join(f"[{i}]" for i in (row, *place[1:]))
    return invalid_field(f"{batch.datum_path(number)}.{name}{inside}", f"is {values[place]}, {why}")
