"""The official OpenAI client, unmodified, against the gateway."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
import tinker

from tests.gateway.conftest import KEY
from tests.gateway_process import GatewayProcess

HELLO: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture
def chat(gateway: GatewayProcess) -> Iterator[openai.OpenAI]:
    """The client."""
    with openai.OpenAI(base_url=f"{gateway.base_url}/oai/api/v1", api_key=KEY, max_retries=0) as made:
        yield made


def test_models_are_listed_by_every_name(chat: openai.OpenAI, gateway: GatewayProcess):
    names = [one.id for one in chat.models.list()]
    assert names[0] == "tiny"
    assert len(names) == 2
    assert chat.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="served: "):
        chat.models.retrieve("gpt-5")


def test_a_completion_is_the_same_streamed_or_whole(chat: openai.OpenAI):
    asked: dict[str, Any] = {"model": "tiny", "prompt": "abc", "max_tokens": 8, "temperature": 0}
    whole = chat.completions.create(**asked)
    streamed = list(chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(one.choices[0].text for one in streamed if one.choices) == whole.choices[0].text
    assert whole.usage is not None
    assert streamed[-1].usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (3, 8)
    assert streamed[-1].usage.total_tokens == 11
    assert whole.choices[0].finish_reason == "length"


def test_a_chat_is_the_same_streamed_or_whole(chat: openai.OpenAI):
    asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_completion_tokens": 8, "temperature": 0}
    whole = chat.chat.completions.create(**asked, logprobs=True)
    streamed = list(chat.chat.completions.create(**asked, stream=True))
    told = "".join(one.choices[0].delta.content or "" for one in streamed if one.choices)
    assert told == whole.choices[0].message.content
    assert streamed[0].choices[0].delta.role == "assistant"
    assert streamed[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert whole.choices[0].logprobs is not None
    assert len(whole.choices[0].logprobs.content or []) == whole.usage.completion_tokens  # pyright: ignore[reportOptionalMemberAccess]


def test_a_chat_reads_what_its_template_writes(chat: openai.OpenAI):
    """<|im_start|>user: hi<|im_end|><|im_start|>assistant:"""
    parts: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}]
    answers = [
        chat.chat.completions.create(model="tiny", messages=messages, max_tokens=6, temperature=0)
        for messages in (HELLO, parts)
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
    assert answers[0].usage is not None
    assert answers[0].usage.prompt_tokens == len("user: hi") + len("assistant: ") + 3


def test_several_choices_of_several_prompts(chat: openai.OpenAI):
    answer = chat.completions.create(model="tiny", prompt=["ab", "cd"], n=2, max_tokens=4, seed=7, logprobs=0)
    assert [one.index for one in answer.choices] == [0, 1, 2, 3]
    again = chat.completions.create(model="tiny", prompt=["ab", "cd"], n=2, max_tokens=4, seed=7, logprobs=0)
    assert [one.text for one in answer.choices] == [one.text for one in again.choices]
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.token_logprobs or []) == 4


def test_a_stop_is_left_out_of_the_text(chat: openai.OpenAI):
    asked: dict[str, Any] = {"model": "tiny", "prompt": "abc", "max_tokens": 12, "temperature": 0}
    text = chat.completions.create(**asked).choices[0].text
    stop = text[2:4]
    expected = text[: text.index(stop)]
    stopped = chat.completions.create(**asked, stop=stop)
    streamed = list(chat.completions.create(**asked, stop=stop, stream=True))
    assert stopped.choices[0].text == expected
    assert stopped.choices[0].finish_reason == "stop"
    assert "".join(one.choices[0].text for one in streamed) == expected


def test_saved_weights_answer_by_either_path(chat: openai.OpenAI, client: tinker.TrainingClient):
    path = client.save_weights_for_sampler("spoken").result().path
    asked: dict[str, Any] = {"messages": HELLO, "max_tokens": 4, "temperature": 0}
    texts = {
        chat.chat.completions.create(model=one, **asked).choices[0].message.content
        for one in (path, path.replace("tinker://", "gradwire://"))
    }
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": HELLO, "tools": [{"type": "function"}]}, "tools is not served"),
        ({"messages": HELLO, "presence_penalty": 0.5}, "presence_penalty is not served"),
        ({"messages": HELLO, "frobnicate": 1}, "frobnicate is not known"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "is no text"),
        ({"messages": HELLO, "temperature": "hot"}, "temperature is a string"),
        ({"messages": HELLO, "top_p": 7}, "top_p"),
        ({"messages": [{"role": "user", "content": "x" * 100}]}, "context"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(chat: openai.OpenAI, asked: dict[str, Any], message: str):
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=message):
            chat.post("/chat/completions", cast_to=object, body={"model": "tiny", "stream": stream, **asked})


def test_likeliest_tokens_are_told_with_each(chat: openai.OpenAI):
    spoken = chat.chat.completions.create(
        model="tiny", messages=HELLO, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    assert spoken.choices[0].logprobs is not None
    for one in spoken.choices[0].logprobs.content or []:
        assert len(one.top_logprobs) == 2
        assert one.top_logprobs[0].token == one.token
    written = chat.completions.create(model="tiny", prompt="abc", max_tokens=3, temperature=0, logprobs=2)
    assert written.choices[0].logprobs is not None
    assert all(len(one) == 2 for one in written.choices[0].logprobs.top_logprobs or [])
