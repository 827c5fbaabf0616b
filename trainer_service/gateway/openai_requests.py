"""Between OpenAI's completions and chat completions and our samples."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from gradwire.v1.sampling_service_pb2 import SamplingParams, Stop

from trainer_service.gateway.bodies import Fields
from trainer_service.gateway.outcomes import Refusal
from trainer_service.gateway.sample_requests import checked_tokens
from trainer_service.gateway.tokenizers import ModelTokenizer

_MAX_UINT32 = (1 << 32) - 1
_DEFAULT_MAX_TOKENS = 16
"""Of a completion, as OpenAI has it; a chat goes on until it ends."""
_USELESS = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key")
"""Fields that describe the caller and change no answer."""


@dataclass
class CompletionRequest:
    """What a completion or chat completion asks for.

    Attributes:
        model: Its name.
        prompts: Token ids of each.
        num_samples: Of each prompt.
        params: How tokens are chosen.
        stop: Texts that end a sample, and are left out of it.
        logprobs: Whether each token's logprob is told.
        top_logprobs: How many of the likeliest tokens are told with it.
        stream: Whether it is told as it comes.
        include_usage: Whether a stream ends with counts.
    """

    model: str
    num_samples: int
    params: SamplingParams
    stop: list[str]
    logprobs: bool
    top_logprobs: int
    stream: bool
    include_usage: bool
    prompts: list[list[int]] = field(default_factory=list)


def read_completion(fields: Fields) -> tuple[CompletionRequest, Any]:
    """A completion, and its prompt as it was given.

    Raises:
        Refusal: A field is missing, unknown or not allowed.
    """
    prompt = fields.value("prompt")
    logprobs = fields.optional_integer("logprobs", low=0, high=_MAX_UINT32)
    asked = _read(fields, logprobs=logprobs is not None, top_logprobs=logprobs or 0, max_tokens=_DEFAULT_MAX_TOKENS)
    fields.refuse("echo", "The prompt is what you sent; asample tells its logprobs.")
    fields.refuse("suffix", "Only what follows a prompt can be completed.")
    fields.refuse("best_of", "Ask for n, and choose.", unless=lambda value: value in (1, asked.num_samples))
    fields.finish()
    return asked, prompt


def read_prompts(prompt: Any, tokenizer: ModelTokenizer) -> list[list[int]]:
    """A text, a list of texts, token ids, or a list of such lists.

    Raises:
        Refusal: It is something else.
    """
    if isinstance(prompt, str):
        return [tokenizer.encode(prompt)]
    if isinstance(prompt, list) and prompt and all(isinstance(one, str) for one in prompt):
        return [tokenizer.encode(one) for one in prompt]
    if isinstance(prompt, list) and prompt and all(isinstance(one, list) for one in prompt):
        return [checked_tokens(one, f"prompt[{place}]") for place, one in enumerate(prompt)]
    if isinstance(prompt, list) and prompt:
        return [checked_tokens(prompt, "prompt")]
    raise Refusal(400, "prompt is none of a text, texts, token ids and lists of token ids.")


def read_chat(fields: Fields) -> tuple[CompletionRequest, list[dict[str, Any]]]:
    """A chat completion, and its messages with their parts joined.

    Raises:
        Refusal: A field is missing, unknown or not allowed.
    """
    messages = [_message(one, f"messages[{place}]") for place, one in enumerate(fields.items("messages"))]
    if not messages:
        raise fields.wrong("messages", "is empty; say at least one thing.")
    top_logprobs = fields.integer("top_logprobs", 0, low=0, high=_MAX_UINT32)
    logprobs = fields.flag("logprobs")
    if top_logprobs and not logprobs:
        raise fields.wrong("top_logprobs", "needs logprobs to be true.")
    newer = fields.optional_integer("max_completion_tokens", low=0, high=_MAX_UINT32)
    asked = _read(fields, logprobs=logprobs, top_logprobs=top_logprobs, max_tokens=newer)
    for name in ("tools", "functions", "tool_choice", "function_call"):
        fields.refuse(name, "Write tools into the messages, as the model's template has them.", unless=_is_none)
    fields.refuse("response_format", "Text is what there is.", unless=lambda value: value == {"type": "text"})
    fields.refuse("modalities", "Text is what there is.", unless=lambda value: value == ["text"])
    fields.ignore("parallel_tool_calls")
    for name in ("audio", "prediction", "web_search_options", "reasoning_effort", "verbosity"):
        fields.refuse(name, "It is not for models of this kind.")
    fields.finish()
    return asked, messages


def _is_none(value: Any) -> bool:
    return value in ([], "none")


def _message(found: Any, where: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise Refusal(400, f"{where} is no object.")
    fields = Fields(found, f"{where}.")
    role, content = fields.text("role"), fields.value("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        parts = [text for text in texts if isinstance(text, str)]
        if len(parts) != len(content):
            raise Refusal(400, f"{where}.content has a part that is no text; this trainer's models read text alone.")
        content = "".join(parts)
    if not isinstance(content, str):
        raise Refusal(400, f"{where}.content is no text.")
    message = {"role": role, "content": content}
    if fields.has("name"):
        message["name"] = fields.text("name")
    fields.refuse("tool_calls", "Write calls into the content, as the model's template has them.")
    fields.refuse("refusal", "Write it into the content.")
    fields.finish()
    return message


def _read(fields: Fields, *, logprobs: bool, top_logprobs: int, max_tokens: int | None) -> CompletionRequest:
    given = fields.optional_integer("max_tokens", low=0, high=_MAX_UINT32)
    stop = fields.value("stop")
    stop = [stop] if isinstance(stop, str) else stop or []
    if not isinstance(stop, list) or not all(isinstance(one, str) and one for one in stop):
        raise fields.wrong("stop", "is none of a text and a list of texts, of which none is empty.")
    params = SamplingParams(
        max_tokens=max_tokens if given is None else given,
        temperature=fields.optional_number("temperature"),
        top_p=fields.optional_number("top_p"),
        # Not OpenAI's, but what its other servers take.
        top_k=fields.optional_integer("top_k", low=-1, high=(1 << 31) - 1),
        seed=fields.optional_integer("seed"),
    )
    for name in ("presence_penalty", "frequency_penalty", "logit_bias"):
        fields.refuse(name, "Use temperature, top_p or top_k.")
    options = fields.fields("stream_options")
    include_usage = options.flag("include_usage")
    options.ignore("include_obfuscation")
    options.finish()
    fields.ignore(*_USELESS)
    return CompletionRequest(
        model=fields.text("model"),
        num_samples=fields.integer("n", 1, low=1, high=_MAX_UINT32),
        params=params,
        stop=stop,
        logprobs=logprobs,
        top_logprobs=top_logprobs,
        stream=fields.flag("stream"),
        include_usage=include_usage,
    )


def sampling_params(asked: CompletionRequest, tokenizer: ModelTokenizer) -> SamplingParams:
    """How tokens are chosen. The model may still end its text itself where the caller gives stops."""
    params = SamplingParams()
    params.CopyFrom(asked.params)
    if asked.stop:
        params.stop.CopyFrom(Stop(strings=asked.stop, token_ids=tokenizer.eos_ids))
    return params


def chat_logprobs(
    tokens: Sequence[int],
    logprobs: Sequence[float],
    likeliest: Sequence[Sequence[tuple[int, float]]],
    texts: ModelTokenizer,
) -> dict[str, Any]:
    """Logprobs of a chat's tokens, as OpenAI tells them."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = texts.token_text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    content = []
    for place, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
        top = [entry(*one) for one in likeliest[place]] if likeliest else []
        content.append({**entry(token, logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}


def completion_logprobs(
    tokens: Sequence[int],
    logprobs: Sequence[float],
    likeliest: Sequence[Sequence[tuple[int, float]]],
    texts: ModelTokenizer,
) -> dict[str, Any]:
    """Logprobs of a completion's tokens, as OpenAI tells them."""
    words = [texts.token_text(token) for token in tokens]
    offsets = [0]
    for word in words:
        offsets.append(offsets[-1] + len(word))
    return {
        "tokens": words,
        "token_logprobs": list(logprobs),
        "top_logprobs": [{texts.token_text(token): logprob for token, logprob in place} for place in likeliest] or None,
        "text_offset": offsets[:-1],
    }
