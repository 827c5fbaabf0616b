"""From a chat to a training datum. Needs a tokenizer of transformers, which is passed in; imports none."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from gradwire.data import datum_from_tokens_weights
from gradwire.types import Datum

TrainOn = Literal["assistant", "last_assistant", "all"]
_TRAIN_ON: tuple[TrainOn, ...] = ("assistant", "last_assistant", "all")
_GENERATION_BLOCK = re.compile(r"{%-?\s*generation\s*-?%}")


def datum_from_messages(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    train_on: TrainOn = "assistant",
    max_length: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Datum:
    """A Datum of a whole chat, with weight 1 on what the assistant says and 0 on everything else.

    The template tells what the assistant says where it marks it (`{% generation %}`). Elsewhere it is what the chat
    with an answer has beyond the chat before it, up to and with the token that ends the turn; it is checked that the
    longer chat begins as the shorter one.

    Args:
        tokenizer: A fast tokenizer of transformers with a chat template, such as `client.get_tokenizer()`.
        messages: `{"role": …, "content": …}` in order, and whatever else the template reads.
        train_on: "assistant": every answer; "last_assistant": the last one alone; "all": every token.
        max_length: Longest sequence kept, in tokens; the rest is cut off at the end. None keeps all.
        chat_template_kwargs: Further arguments of the template, such as `{"tools": […], "enable_thinking": False}`.

    Returns:
        Datum with loss_fn_inputs "target_tokens" (int64 [N - 1]) and "weights" (float32 [N - 1]), see
        datum_from_tokens_weights.

    Raises:
        ValueError: There is no answer to train on, the tokenizer has no chat template or is not a fast one, or the
            template writes the chat before an answer in another way than the chat with it.
    """
    if train_on not in _TRAIN_ON:
        raise ValueError(f"train_on is {train_on!r}; it must be one of {', '.join(map(repr, _TRAIN_ON))}.")
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise ValueError(
            "tokenizer has no chat template; set tokenizer.chat_template, or use datum_from_tokens_weights."
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            "tokenizer is not a fast one, so it cannot say which tokens are whose; load it with use_fast=True."
        )
    messages = [dict(message) for message in messages]
    answers = [place for place, message in enumerate(messages) if message.get("role") == "assistant"]
    if not answers and train_on != "all":
        roles = ", ".join(repr(message.get("role")) for message in messages) or "none"
        raise ValueError(f"messages has no answer to train on: its roles are {roles}, and none is 'assistant'.")
    chat = _Chat(tokenizer, messages, dict(chat_template_kwargs or {}))
    if train_on == "all":
        tokens, _ = chat.tokens()
        return datum_from_tokens_weights(tokens, [1.0] * len(tokens), max_length)
    last_only = train_on == "last_assistant"
    if isinstance(template, str) and _GENERATION_BLOCK.search(template):
        tokens, spoken = chat.marked()
        spoken = _last_run(spoken) if last_only else spoken
    else:
        tokens, spoken = chat.spoken(answers[-1:] if last_only else answers)
    return datum_from_tokens_weights(tokens, [float(one) for one in spoken], max_length)


class _Chat:
    def __init__(self, tokenizer: Any, messages: list[dict[str, Any]], kwargs: dict[str, Any]) -> None:
        self._tokenizer = tokenizer
        self._messages = messages
        self._kwargs = kwargs

    def tokens(self) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of the whole chat, and where each stands in its text."""
        encoded = self._tokenizer(
            self._text(len(self._messages)), add_special_tokens=False, return_offsets_mapping=True
        )
        return list(encoded["input_ids"]), [(start, end) for start, end in encoded["offset_mapping"]]

    def marked(self) -> tuple[list[int], list[bool]]:
        """The chat's tokens, and which of them the template marks as the assistant's."""
        encoded = self._tokenizer.apply_chat_template(
            self._messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **self._kwargs
        )
        return list(encoded["input_ids"]), [bool(one) for one in encoded["assistant_masks"]]

    def spoken(self, answers: list[int]) -> tuple[list[int], list[bool]]:
        """The chat's tokens, and which of them an answer adds to the chat before it."""
        tokens, places = self.tokens()
        specials = set(self._tokenizer.all_special_ids)
        whole = self._text(len(self._messages))
        spoken = [False] * len(tokens)
        for answer in answers:
            before, behind = self._text(answer, prompt=True), self._text(answer + 1)
            if not (behind.startswith(before) and whole.startswith(behind)):
                raise ValueError(
                    f"The chat template writes messages[:{answer + 1}] otherwise when more follow, so what "
                    f'messages[{answer}] adds cannot be told. Use train_on="last_assistant" with the messages up to '
                    "it, mark answers in the template with {% generation %}, or use datum_from_tokens_weights."
                )
            # A token that begins in the question belongs to it: the model is given it, and does not say it.
            own = [at for at, (start, end) in enumerate(places) if len(before) <= start < end <= len(behind)]
            ends = [at for at in own if tokens[at] in specials]
            if ends and not whole[places[ends[-1]][1] : len(behind)].strip():
                # Behind the end of the turn is what the template puts between turns.
                own = own[: own.index(ends[-1]) + 1]
            for at in own:
                spoken[at] = True
        return tokens, spoken

    def _text(self, count: int, *, prompt: bool = False) -> str:
        return self._tokenizer.apply_chat_template(
            self._messages[:count], tokenize=False, add_generation_prompt=prompt, **self._kwargs
        )


def _last_run(spoken: list[bool]) -> list[bool]:
    """The last uninterrupted run of True alone."""
    end = max((at for at, one in enumerate(spoken) if one), default=-1) + 1
    start = end
    while start and spoken[start - 1]:
        start -= 1
    return [start <= at < end for at in range(len(spoken))]
