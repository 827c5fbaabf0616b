"""What a client asks to be generated, checked."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from gradwire._wire.codec import decode_tensor
from gradwire.errors import invalid_field
from gradwire.v1.sampling_service_pb2 import SampleRequest, SamplingParams, Stop

from trainer_service.config import Limits
from trainer_service.engine.sampling.picking import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE, Choice
from trainer_service.engine.sampling.stops import StopStrings
from trainer_service.engine.sampling.text import Text
from trainer_service.field_limits import check_limits, prompt_too_long

_MESSAGE_INTERVAL_MS, _LONGEST_INTERVAL_MS = 50, 10_000
"""Tokens that come faster travel together: a message each would cost trainer and client more than the tokens."""


@dataclass(frozen=True)
class Request:
    """One Sample request.

    Attributes:
        prompt: Token ids.
        num_samples: How many.
        max_tokens: Of each sample; 0 generates none.
        choice: How tokens are chosen.
        seed: Of the samples' generators.
        stop_tokens: Tokens that end a sample.
        stop_strings: Texts that end one; None for none.
        prompt_logprobs: Whether they are asked for.
        topk: Likeliest tokens asked for at each place of the prompt.
        first_row: Of what is asked for about the prompt; row i is about token i + 1.
        targets: Token ids whose logprobs are asked for, int64 [N - 1, K], -1 for none; None where none are.
        topk_sampled: Likeliest tokens asked for at each place of the samples.
        message_interval_s: Least time between two messages of tokens.
        with_text: Whether responses carry text.
        text: The tokenizer; None where nothing of it is text.
    """

    prompt: list[int]
    num_samples: int
    max_tokens: int
    choice: Choice
    seed: int
    stop_tokens: frozenset[int]
    stop_strings: StopStrings | None
    prompt_logprobs: bool
    topk: int
    with_text: bool
    text: Text | None
    first_row: int = 0
    targets: npt.NDArray[np.int64] | None = None
    topk_sampled: int = 0
    message_interval_s: float = _MESSAGE_INTERVAL_MS / 1000

    @property
    def wants_prompt(self) -> bool:
        """Whether anything about the prompt is asked for."""
        return self.prompt_logprobs or self.topk > 0 or self.targets is not None

    @cached_property
    def first_target_row(self) -> int:
        """The first row of targets that names one; as many as there are where none does."""
        if self.targets is None:
            return len(self.prompt) - 1
        rows = np.flatnonzero((self.targets >= 0).any(axis=1))
        return int(rows[0]) if len(rows) else len(self.targets)

    def rows_from(self) -> int:
        """The first row that anything is asked for about."""
        whole = self.first_row if self.prompt_logprobs or self.topk else len(self.prompt) - 1
        return min(whole, self.first_target_row)


def read_request(
    message: SampleRequest,
    *,
    vocab_size: int,
    max_context_length: int,
    limits: Limits,
    eos_tokens: frozenset[int],
    text: Callable[[], Text],
) -> Request:
    """The request of a message.

    Args:
        message: From a client.
        vocab_size: Token ids are below it.
        max_context_length: Prompt and sample together, tokens.
        limits: The most there may be.
        eos_tokens: What ends a sample where the message does not say.
        text: The model's tokenizer; called only where it is needed.

    Raises:
        InvalidArgumentError: INVALID_FIELD or SEQUENCE_TOO_LONG, with the field's path.
        ResourceExhaustedError: LIMIT_EXCEEDED.
    """
    check_limits(message, limits)
    prompt = _prompt(message, vocab_size, text)
    if len(prompt) > max_context_length:
        raise prompt_too_long(len(prompt), max_context_length)
    num_samples = message.num_samples if message.HasField("num_samples") else 1
    _check_range("num_samples", num_samples, 1, limits.max_num_samples)
    _check_range("topk_prompt_logprobs", message.topk_prompt_logprobs, 0, min(limits.max_topk_logprobs, vocab_size))
    highest = min(limits.max_topk_logprobs, vocab_size)
    _check_range("topk_sample_logprobs", message.topk_sample_logprobs, 0, highest)
    _check_range("message_interval_ms", message.message_interval_ms, 0, _LONGEST_INTERVAL_MS)
    params = message.sampling_params
    stop_tokens, stop_strings = eos_tokens, None
    if params.HasField("stop"):
        stop_tokens, stop_strings = _stop(params.stop, vocab_size)
    with_text = bool(message.prompt_text)
    return Request(
        prompt=prompt,
        num_samples=num_samples,
        max_tokens=_max_tokens(params, len(prompt), max_context_length),
        choice=_choice(params, vocab_size),
        seed=params.seed if params.HasField("seed") else secrets.randbits(63),
        stop_tokens=stop_tokens,
        stop_strings=stop_strings,
        prompt_logprobs=message.include_prompt_logprobs,
        topk=message.topk_prompt_logprobs,
        with_text=with_text,
        text=text() if with_text or stop_strings is not None else None,
        first_row=_first_row(message, len(prompt)),
        targets=_targets(message, len(prompt), vocab_size, limits),
        topk_sampled=message.topk_sample_logprobs,
        message_interval_s=(message.message_interval_ms or _MESSAGE_INTERVAL_MS) / 1000,
    )


def _first_row(message: SampleRequest, num_prompt: int) -> int:
    if not message.HasField("prompt_logprobs_last_n"):
        return 0
    if not message.include_prompt_logprobs and not message.topk_prompt_logprobs:
        raise invalid_field(
            "prompt_logprobs_last_n", "is set without include_prompt_logprobs or topk_prompt_logprobs; set one of them."
        )
    if num_prompt < 2:
        raise invalid_field("prompt_logprobs_last_n", "is set, but of a prompt of one token there are no logprobs.")
    _check_range("prompt_logprobs_last_n", message.prompt_logprobs_last_n, 1, num_prompt - 1)
    return num_prompt - 1 - message.prompt_logprobs_last_n


def _targets(message: SampleRequest, num_prompt: int, vocab_size: int, limits: Limits) -> npt.NDArray[np.int64] | None:
    where = "target_prompt_logprobs"
    if not message.HasField(where):
        return None
    targets = decode_tensor(message.target_prompt_logprobs, where)
    if targets.dtype != np.int64 or targets.ndim != 2 or len(targets) != num_prompt - 1:
        raise invalid_field(
            where,
            f"is {targets.dtype} {list(targets.shape)}; it must be int64 [{num_prompt - 1}, K], a row for each token "
            "of the prompt but the first.",
        )
    _check_range(f"{where}.shape[1]", targets.shape[1], 1, limits.max_topk_logprobs)
    wrong = (targets < -1) | (targets >= vocab_size)
    if wrong.any():
        row, column = (int(place[0]) for place in wrong.nonzero())
        what = f"is {targets[row, column]}; token ids of this model are 0 to {vocab_size - 1}, and -1 asks for nothing."
        raise invalid_field(f"{where}[{row}][{column}]", what)
    return targets


def _prompt(message: SampleRequest, vocab_size: int, text: Callable[[], Text]) -> list[int]:
    if message.prompt_text:
        if message.prompt.tokens:
            raise invalid_field("prompt_text", "and prompt are both set; send one of them.")
        tokens = text().encode(message.prompt_text)
        if not tokens:
            raise invalid_field("prompt_text", "is no token in this model's tokenizer; write something more.")
    else:
        tokens = list(message.prompt.tokens)
        if not tokens:
            raise invalid_field("prompt", "has no tokens; it needs at least one to continue from.")
    _check_tokens("prompt.tokens", tokens, vocab_size)
    return tokens


def _check_tokens(where: str, tokens: list[int], vocab_size: int) -> None:
    for place, token in enumerate(tokens):
        if not 0 <= token < vocab_size:
            raise invalid_field(f"{where}[{place}]", f"is {token}; token ids of this model are 0 to {vocab_size - 1}.")


def _check_range(where: str, got: int, lowest: int, highest: int) -> None:
    if not lowest <= got <= highest:
        raise invalid_field(where, f"is {got}; it must be {lowest} to {highest}.", limit=highest, got=got)


def _max_tokens(params: SamplingParams, num_prompt: int, max_context_length: int) -> int:
    """As many as were asked for, or as the context has room for behind the prompt."""
    room = max_context_length - num_prompt
    asked = params.max_tokens if params.HasField("max_tokens") else max_context_length
    if asked and not room:
        raise invalid_field(
            "prompt",
            f"has {num_prompt} tokens and fills the context of {max_context_length}, so nothing can be generated; "
            "shorten it, or pass max_tokens=0 for the prompt's logprobs alone.",
            reason="SEQUENCE_TOO_LONG",
            limit=max_context_length - 1,
            got=num_prompt,
        )
    return min(asked, room)


def _choice(params: SamplingParams, vocab_size: int) -> Choice:
    temperature = params.temperature if params.HasField("temperature") else 1.0
    if temperature and not LOWEST_TEMPERATURE <= temperature <= HIGHEST_TEMPERATURE:
        raise invalid_field(
            "sampling_params.temperature",
            f"is {temperature:g}; it must be 0, which takes the likeliest, or {LOWEST_TEMPERATURE:g} to "
            f"{HIGHEST_TEMPERATURE:g}.",
        )
    if params.top_k < -1:
        raise invalid_field("sampling_params.top_k", f"is {params.top_k}; it must be at least 1, or -1 or 0 for off.")
    top_p = params.top_p if params.HasField("top_p") else 1.0
    if not 0 < top_p <= 1:
        raise invalid_field("sampling_params.top_p", f"is {top_p:g}; it must be above 0 and at most 1, which is off.")
    return Choice(temperature, max(0, min(params.top_k, vocab_size)), top_p)


def _stop(stop: Stop, vocab_size: int) -> tuple[frozenset[int], StopStrings | None]:
    _check_tokens("sampling_params.stop.token_ids", list(stop.token_ids), vocab_size)
    for place, string in enumerate(stop.strings):
        if not string:
            raise invalid_field(f"sampling_params.stop.strings[{place}]", "is empty, which every text holds.")
    return frozenset(stop.token_ids), StopStrings(stop.strings) if stop.strings else None
