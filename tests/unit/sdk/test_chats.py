"""From a chat to a datum: whose words are trained on, with templates that say it and templates that do not."""

from pathlib import Path
from typing import Any

import gradwire
import pytest
from transformers import AutoTokenizer

CHAT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "2+2"},
    {"role": "assistant", "content": "4"},
]
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}: {% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ message['content'] }}<|im_end|>"
    "{% endif %}{% endfor %}"
)
BETWEEN_TURNS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}: {{ message['content'] }}<|im_end|>   {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)
FORGETFUL = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}: "
    "{{ message['content'] if loop.last else '(cut)' }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
)


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


def trained(tokenizer: Any, datum: gradwire.Datum) -> list[str]:
    """The runs of tokens with weight 1, as text."""
    inputs = datum.loss_fn_inputs
    runs, before = [], 0.0
    for token, weight in zip(inputs["target_tokens"].data, inputs["weights"].data, strict=True):
        if weight:
            text = tokenizer.decode([token])
            runs[-1:] = [runs[-1] + text] if before else [*runs[-1:], text]
        before = weight
    return runs


@pytest.mark.parametrize("template", [None, MARKED, BETWEEN_TURNS])
def test_what_the_assistant_says_is_trained_on_with_the_end_of_its_turn(tokenizer: Any, template: str | None):
    tokenizer.chat_template = template or tokenizer.chat_template
    datum = gradwire.datum_from_messages(tokenizer, CHAT)
    assert trained(tokenizer, datum) == ["Yes?<|im_end|>", "4<|im_end|>"]
    last = gradwire.datum_from_messages(tokenizer, CHAT, train_on="last_assistant")
    assert trained(tokenizer, last) == ["4<|im_end|>"]
    # The model reads what it would read when it is asked.
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert datum.model_input.to_ints() == tokenizer.encode(text, add_special_tokens=False)[:-1]


def test_all_of_a_chat_can_be_trained_on(tokenizer: Any):
    datum = gradwire.datum_from_messages(tokenizer, CHAT[:1], train_on="all")
    assert trained(tokenizer, datum) == ["user: Hi<|im_end|>"]


def test_a_long_chat_is_cut_at_its_end(tokenizer: Any):
    whole = gradwire.datum_from_messages(tokenizer, CHAT)
    cut = gradwire.datum_from_messages(tokenizer, CHAT, max_length=30)
    assert cut.model_input.to_ints() == whole.model_input.to_ints()[:29]


def test_arguments_reach_the_template(tokenizer: Any):
    tokenizer.chat_template = "{{ mood }}" + tokenizer.chat_template
    datum = gradwire.datum_from_messages(tokenizer, CHAT, chat_template_kwargs={"mood": "glad"})
    assert tokenizer.decode(datum.model_input.to_ints()).startswith("glad<|im_start|>user")


def test_a_template_that_rewrites_what_was_said_is_refused_but_for_the_last_answer(tokenizer: Any):
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(ValueError, match=r"writes messages\[:2\] otherwise when more follow"):
        gradwire.datum_from_messages(tokenizer, CHAT)


@pytest.mark.parametrize(
    ("change", "arguments", "text"),
    [
        ({}, {"train_on": "user"}, r"train_on is 'user'; it must be one of 'assistant', 'last_assistant', 'all'\."),
        ({}, {"messages": CHAT[:1]}, r"no answer to train on: its roles are 'user', and none is 'assistant'\."),
        ({}, {"messages": []}, r"its roles are none"),
        ({"chat_template": None}, {}, r"tokenizer has no chat template"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(
    tokenizer: Any, change: dict[str, Any], arguments: dict[str, Any], text: str
):
    for name, value in change.items():
        setattr(tokenizer, name, value)
    with pytest.raises(ValueError, match=text):
        gradwire.datum_from_messages(tokenizer, **{"messages": CHAT, **arguments})
