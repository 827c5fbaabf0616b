"""The models every comparison runs on."""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.numerics.architectures import make_model
from tests.numerics.plain import PlainSequence, random_sequences, text_sequences
from tests.tiny import VOCAB_SIZE

_ROOT = Path(__file__).resolve().parents[2]
_SMOLLM2_LAYERS = 6
_TEXTS = (
    "Water boils at one hundred degrees.",
    "The",
    "The quick brown fox jumps over the lazy dog.",
    "Once upon a time there was a king.",
)


@dataclass(frozen=True)
class ModelCase:
    """A model, and sequences fit for it: `sequences()` [N], `sequences(3)` [N, 3]; four, one of a single token."""

    folder: Path
    sequences: Callable[..., list[PlainSequence]]


@pytest.fixture(
    scope="session", params=["tiny_llama", pytest.param("smollm2", marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelCase:
    """A tiny random Llama, and the first layers of SmolLM2-135M-Instruct if that has been fetched."""
    if request.param == "tiny_llama":
        return ModelCase(
            request.getfixturevalue("tiny_llama"),
            lambda k=None: random_sequences((9, 1, 23, 16), vocab_size=VOCAB_SIZE, k=k),
        )
    folder = Path(os.environ.get("GRADWIRE_SMOLLM2") or _ROOT / "models" / "SmolLM2-135M-Instruct")
    if not (folder / "tokenizer.json").is_file():
        pytest.skip(f"{folder} has no model; run scripts/fetch_model.py, or set GRADWIRE_SMOLLM2 to its folder")
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    first_layers = tmp_path_factory.mktemp("smollm2")
    model = AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=_SMOLLM2_LAYERS, dtype="float32")
    model.save_pretrained(first_layers)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = [tokenizer.encode("<|im_start|>" + text).ids for text in _TEXTS]
    return ModelCase(first_layers, lambda k=None: text_sequences(tokens, k=k))


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The model folder of an architecture (architectures.make_model); each is made once."""
    root = tmp_path_factory.mktemp("architectures")
    return functools.cache(functools.partial(make_model, root))
