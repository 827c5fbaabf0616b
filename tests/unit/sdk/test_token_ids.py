"""What tokenizers return is taken as token ids wherever token ids are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gradwire import Datum, EncodedTextChunk, ModelInput, datum_from_tokens_weights
from gradwire._wire.codec import batch_from_data
from gradwire.errors import InvalidArgumentError
from gradwire.types.data import model_input_tokens

IDS = [5, 6, 7]


def batch_encoding(**fields: Any) -> Any:
    from transformers import BatchEncoding

    return BatchEncoding(fields)


ONE_SEQUENCE = {
    "a list": IDS,
    "a tuple": tuple(IDS),
    "numpy": np.array(IDS),
    "torch": torch.tensor(IDS),
    "torch scalars": list(torch.tensor(IDS)),
    "a batch of one list": [IDS],
    "a batch of one array": [np.array(IDS)],
    "a batch of one in numpy": np.array([IDS], dtype=np.int32),
    "a batch of one in torch": torch.tensor([IDS]),
    "a dict": {"input_ids": IDS, "attention_mask": [1, 1, 1]},
    "a dict of a batch of one": {"input_ids": [IDS]},
    "BatchEncoding": batch_encoding(input_ids=IDS, attention_mask=[1, 1, 1]),
    "BatchEncoding of torch": batch_encoding(input_ids=torch.tensor([IDS]), attention_mask=torch.ones(1, 3)),
}


@pytest.mark.parametrize("name", ONE_SEQUENCE)
def test_one_sequence_is_taken_in_every_form_and_place(name: str):
    tokens = ONE_SEQUENCE[name]
    assert ModelInput.from_ints(tokens).to_ints() == IDS
    assert model_input_tokens(tokens, "prompt").tolist() == IDS
    chunk = EncodedTextChunk(tokens)
    assert (chunk.length, ModelInput([chunk]).to_ints()) == (3, IDS)
    batch = batch_from_data([Datum(tokens, {"target_tokens": IDS})])
    assert batch.tokens_T.tolist() == IDS
    datum = datum_from_tokens_weights(tokens, np.ones((1, 3)))
    assert (datum.model_input.to_ints(), datum.loss_fn_inputs["target_tokens"].data) == ([5, 6], [6, 7])


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("Hello", "is text; it must be token ids"),
        ([IDS, IDS], "is a batch of 2 sequences"),
        (np.array([IDS, IDS]), "is a batch of 2 sequences"),
        ({"input_ids": torch.tensor([IDS, IDS])}, r'\["input_ids"\] is a batch of 2 sequences'),
        ({"input_ids": [IDS, [1]], "attention_mask": [[1, 1, 1], [1]]}, "is a batch of 2 sequences"),
        ({"attention_mask": [1], "labels": [1]}, 'is a dict of attention_mask, labels; it must have "input_ids"'),
        (batch_encoding(input_ids=[0, *IDS], attention_mask=[0, 1, 1, 1]), "is padded: its attention_mask .* 1 of 4"),
        ({"input_ids": [IDS], "attention_mask": torch.tensor([[1, 1, 0]])}, "is padded"),
        ([{"role": "user", "content": "Hello"}], "is a list of dict; .* apply_chat_template"),
        ([1.5, 2.5], "must be a one-dim sequence of integers, got dtype float64"),
        (np.zeros((1, 2, 3), dtype=np.int64), "got dtype int64 and shape"),
    ],
)
def test_what_is_not_one_sequence_is_refused_in_a_sentence(tokens: Any, message: str):
    with pytest.raises(ValueError, match=message):
        ModelInput.from_ints(tokens)
    with pytest.raises(ValueError, match=message):
        datum_from_tokens_weights(tokens, [1.0])
    with pytest.raises(InvalidArgumentError, match=f"data\\[0\\].model_input.*{message}"):
        batch_from_data([Datum(tokens, {"target_tokens": IDS})])


def test_a_chat_templates_result_and_a_tokenizers_encoding_are_taken(tiny_llama: Path):
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_llama)
    messages = [{"role": "user", "content": "Hi"}]
    templated = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True)
    ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
    assert ModelInput.from_ints(templated).to_ints() == ids
    encoding = Tokenizer.from_file(str(tiny_llama / "tokenizer.json")).encode("Hi", add_special_tokens=False)
    assert ModelInput.from_ints(encoding).to_ints() == encoding.ids


def test_an_input_of_a_loss_given_as_a_mapping_is_refused_by_name():
    with pytest.raises(ValueError, match="a dict of input_ids is not an array; pass one of them"):
        Datum(IDS, {"target_tokens": {"input_ids": IDS}})

    class OtherDatum:
        model_input = IDS
        loss_fn_inputs = {"target_tokens": {"input_ids": IDS}}

    with pytest.raises(InvalidArgumentError, match=r'data\[0\].loss_fn_inputs\["target_tokens"\] .*not an array'):
        batch_from_data([OtherDatum()])
