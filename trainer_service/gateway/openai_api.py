"""OpenAI's endpoints: models, completions and chat completions, streamed too."""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
from gradwire.errors import GradwireError, from_rpc_error
from gradwire.v1.datum_pb2 import ModelInput
from gradwire.v1.sampling_service_pb2 import STOP_REASON_STOP, SampledTokens, Sampler, SampleRequest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from trainer_service.gateway.bodies import read_fields
from trainer_service.gateway.gateway import Gateway
from trainer_service.gateway.openai_requests import (
    CompletionRequest,
    chat_logprobs,
    completion_logprobs,
    read_chat,
    read_completion,
    read_prompts,
    sampling_params,
)
from trainer_service.gateway.outcomes import Refusal, refusal_of
from trainer_service.gateway.sessions import Caller
from trainer_service.gateway.tokenizers import GrowingText, ModelTokenizer
from trainer_service.gateway.trainers import Trainer, metadata
from trainer_service.tracing import trace_headers

_MAX_PROMPTS = 128
_WHOLE_INTERVAL_MS = 1000
"""Between messages of an answer that is not streamed."""


def openai_refusal(refusal: Refusal) -> Response:
    """A refusal in OpenAI's form."""
    kind = "invalid_request_error" if refusal.status < 500 else "server_error"
    if refusal.status == 401:
        kind = "authentication_error"
    body = {"message": refusal.message, "type": kind, "param": None, "code": refusal.reason.lower()}
    return JSONResponse({"error": body}, refusal.status)


async def models(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Lists what can be named as a model; checkpoints can be named by their paths as well."""
    served = await gateway.trainers.served(caller.key)
    return {"object": "list", "data": [_model(one.name) for one in served]}


async def model(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Describes one model."""
    name = request.path_params["model"]
    await _find(gateway, caller, name)
    return _model(name)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "gradwire"}


async def completions(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Completes one or several prompts."""
    asked, prompt = read_completion(await read_fields(request))
    trainer, sampler = await _find(gateway, caller, asked.model)
    tokenizer = await gateway.tokenizers.of(trainer, caller.key)
    asked.prompts = read_prompts(prompt, tokenizer)
    return await _answer(_Completion(trainer, sampler, tokenizer, asked, caller.key, chat=False))


async def chat_completions(gateway: Gateway, caller: Caller, request: Request) -> Any:
    """Completes a chat with the assistant's next message."""
    asked, messages = read_chat(await read_fields(request))
    trainer, sampler = await _find(gateway, caller, asked.model)
    tokenizer = await gateway.tokenizers.of(trainer, caller.key)
    asked.prompts = [tokenizer.chat(messages)]
    return await _answer(_Completion(trainer, sampler, tokenizer, asked, caller.key, chat=True))


async def _find(gateway: Gateway, caller: Caller, name: str) -> tuple[Trainer, Sampler]:
    if name.startswith(("tinker://", "gradwire://")):
        trainer, found = await gateway.models.find_checkpoint(name, caller.key, field="model")
        return trainer, Sampler(model_path=found.path)
    served = await gateway.trainers.find(name, caller.key)
    return served.trainer, Sampler(base_model="")


class _Completion:
    """One request under way: samples of all its prompts, and how they are told."""

    def __init__(
        self,
        trainer: Trainer,
        sampler: Sampler,
        tokenizer: ModelTokenizer,
        asked: CompletionRequest,
        key: str,
        *,
        chat: bool,
    ) -> None:
        if len(asked.prompts) > _MAX_PROMPTS:
            raise Refusal(400, f"prompt has {len(asked.prompts)} prompts; one request takes {_MAX_PROMPTS}.")
        self._trainer = trainer
        self._sampler = sampler
        self._tokenizer = tokenizer
        self.asked = asked
        self._key = key
        self._chat = chat
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())

    async def parts(self) -> AsyncIterator[tuple[int, SampledTokens]]:
        """(index of the choice, its next tokens), prompt by prompt as they come.

        Raises:
            GradwireError: What a call ended with.
        """
        queue: asyncio.Queue[tuple[int, SampledTokens] | GradwireError | None] = asyncio.Queue(maxsize=64)

        async def sample(first: int, prompt: list[int]) -> None:
            request = SampleRequest(
                sampler=self._sampler,
                prompt=ModelInput(tokens=prompt),
                num_samples=self.asked.num_samples,
                sampling_params=sampling_params(self.asked, self._tokenizer),
                topk_sample_logprobs=self.asked.top_logprobs,
                message_interval_ms=0 if self.asked.stream else _WHOLE_INTERVAL_MS,
            )
            call = self._trainer.sampling.Sample(request, metadata=metadata(self._key, trace_headers.get()))
            try:
                async for response in call:
                    for part in response.samples:
                        await queue.put((first + part.sample, part))
                await queue.put(None)
            except grpc.aio.AioRpcError as exc:
                await queue.put(from_rpc_error(exc))
            finally:
                call.cancel()

        prompts = self.asked.prompts
        tasks = [
            asyncio.create_task(sample(place * self.asked.num_samples, prompt)) for place, prompt in enumerate(prompts)
        ]
        try:
            ended = 0
            while ended < len(tasks):
                part = await queue.get()
                if isinstance(part, GradwireError):
                    raise part
                if part is None:
                    ended += 1
                else:
                    yield part
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def num_choices(self) -> int:
        """The number of tokens of all prompts."""
        return len(self.asked.prompts) * self.asked.num_samples

    def usage(self, completion_tokens: int) -> dict[str, int]:
        """Counts of tokens."""
        prompt_tokens = sum(map(len, self.asked.prompts))
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }

    def text(self) -> GrowingText:
        """The first part of a streamed choice."""
        return GrowingText(self._tokenizer, self.asked.stop)

    def logprobs(self, parts: list[SampledTokens]) -> dict[str, Any] | None:
        """Of some tokens; None where nobody asked."""
        if not self.asked.logprobs:
            return None
        k = self.asked.top_logprobs
        tokens = [token for part in parts for token in part.tokens]
        values = [value for part in parts for value in part.logprobs]
        likeliest = []
        if k:
            pairs = [pair for part in parts for pair in zip(part.topk_tokens, part.topk_logprobs, strict=True)]
            likeliest = [pairs[place : place + k] for place in range(0, len(pairs), k)]
        tell = chat_logprobs if self._chat else completion_logprobs
        return tell(tokens, values, likeliest, self._tokenizer)

    def whole(self, choices: list[dict[str, Any]], completion_tokens: int) -> dict[str, Any]:
        """An answer that is not streamed."""
        return {**self._head("chat.completion"), "choices": choices, "usage": self.usage(completion_tokens)}

    def choice(self, index: int, text: str, parts: list[SampledTokens], reason: str) -> dict[str, Any]:
        """One choice of an answer."""
        content = {"message": {"role": "assistant", "content": text, "refusal": None}} if self._chat else {"text": text}
        return {"index": index, **content, "logprobs": self.logprobs(parts), "finish_reason": reason}

    def chunk(self, index: int, text: str, parts: list[SampledTokens], reason: str | None) -> dict[str, Any]:
        """A piece of a streamed answer."""
        content = {"delta": {"content": text} if text or reason is None else {}} if self._chat else {"text": text}
        choice = {"index": index, **content, "logprobs": self.logprobs(parts), "finish_reason": reason}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a streamed chat's choice begins with."""
        if not self._chat:
            return None
        choice = {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def counts(self, completion_tokens: int) -> dict[str, Any]:
        """What a stream ends with where it was asked for."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage(completion_tokens)}

    def _head(self, kind: str) -> dict[str, Any]:
        kind = kind if self._chat else "text_completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self.asked.model}


async def _answer(completion: _Completion) -> Any:
    if not completion.asked.stream:
        return await _whole(completion)
    parts = completion.parts()
    # The first part tells whether there will be an answer at all; refusals have a status of their own.
    first = await anext(parts, None)
    return StreamingResponse(_events(completion, first, parts), media_type="text/event-stream")


async def _whole(completion: _Completion) -> dict[str, Any]:
    parts: list[list[SampledTokens]] = [[] for _ in range(completion.num_choices)]
    async for index, part in completion.parts():
        parts[index].append(part)
    choices = []
    for index, own in enumerate(parts):
        text = completion.text()
        told = text.add([token for part in own for token in part.tokens], last=True)
        choices.append(completion.choice(index, told, own, _reason(own[-1]) if own else "length"))
    count = sum(len(part.tokens) for own in parts for part in own)
    return completion.whole(choices, count)


def _reason(part: SampledTokens) -> str:
    return "stop" if part.stop_reason == STOP_REASON_STOP else "length"


async def _events(
    completion: _Completion, first: Any, parts: AsyncIterator[tuple[int, SampledTokens]]
) -> AsyncIterator[str]:
    """Server-sent events; a failure after the first one is sent as an event."""
    texts = [completion.text() for _ in range(completion.num_choices)]
    count = 0
    async with contextlib.aclosing(parts):  # pyright: ignore[reportArgumentType]
        for index in range(completion.num_choices):
            if (opening := completion.opening(index)) is not None:
                yield _event(opening)
        try:
            part = first
            while part is not None:
                index, tokens = part
                count += len(tokens.tokens)
                ended = bool(tokens.stop_reason)
                told = texts[index].add(tokens.tokens, last=ended)
                if told or ended or completion.asked.logprobs:
                    yield _event(completion.chunk(index, told, [tokens], _reason(tokens) if ended else None))
                part = await anext(parts, None)
        except GradwireError as exc:
            yield _event(json.loads(bytes(openai_refusal(refusal_of(exc)).body)))
            return
    if completion.asked.include_usage:
        yield _event(completion.counts(count))
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
