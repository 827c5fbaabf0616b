"""Text of samples as it grows behind a prompt, and stop strings in it: with tokenizers of each kind that there is."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from trainer_service.engine.sampling.stops import START, StopStrings
from trainer_service.engine.sampling.text import Text, Transcript

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
WORDS = ["▁", "▁any", "any", "▁the", "a", "b", "c", "▁a", "x", "y", "z", "ny", "▁x"]


def byte_level(folder: Path) -> Text:
    """As GPT-2's and Llama 3's: every byte is a token, and a few are joined."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: number for number, token in enumerate([*alphabet, "Ġa", "an", "ny", "Ġany", "any"])}
    merges = [("Ġ", "a"), ("a", "n"), ("n", "y"), ("Ġa", "ny"), ("an", "y")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return saved(tokenizer, folder)


def byte_fallback(folder: Path) -> Text:
    """As Llama 2's, from sentencepiece: words begin with a space, which a text's first word loses when decoded."""
    vocab = {token: number for number, token in enumerate(["<unk>", *BYTES, *WORDS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return saved(tokenizer, folder)


def metaspace(folder: Path) -> Text:
    """As T5's and Gemma's."""
    vocab = {token: number for number, token in enumerate(["<unk>", *WORDS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return saved(tokenizer, folder)


def saved(tokenizer: Tokenizer, folder: Path) -> Text:
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    return Text(folder)


def in_python(folder: Path) -> Text:
    """ByT5's, which is not one of those in Rust."""
    ByT5Tokenizer().save_pretrained(folder)
    return Text(folder)


KINDS = [byte_level, byte_fallback, metaspace, in_python]
NO_TOKEN = 5000
"""An id that no token has, as models with padded vocabularies sample it."""
PIECES = ["any", " any", "x", "é", "🎉", " ", "  ", "<|end|>", "a b", "中文", ""]
"""Of texts; "" stands for such an id."""


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def text(request: pytest.FixtureRequest, tmp_path: Path) -> Text:
    made: Callable[[Path], Text] = request.param
    return made(tmp_path)


def tokens_of(text: Text) -> int:
    return len(text._tokenizer)


def behind(text: Text, prompt: list[int], tokens: list[int]) -> str:
    """The text of tokens as it stands behind a prompt."""
    whole, before = text.decode(prompt + tokens), text.decode(prompt)
    return whole[len(before) :]


def test_strings_are_found_wherever_they_are_cut():
    rng = random.Random(0)
    for _ in range(2000):
        strings = ["".join(rng.choices("ab🎉", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 4))]
        stops, state, so_far = StopStrings(strings), START, ""
        for _ in range(6):
            piece = "".join(rng.choices("ab🎉", k=rng.randint(0, 3)))
            so_far += piece
            following = stops.feed(state, piece)
            assert (following is None) == any(string in so_far for string in strings), (strings, so_far)
            if following is None:
                break
            state = following


class Counted(dict[int, int]):
    """A table that counts how often it is asked."""

    asked = 0

    def get(self, key: int, default: Any = None) -> Any:
        self.asked += 1
        return super().get(key, default)


@pytest.mark.parametrize("text", ["ab" * 500, "a" * 59 + "b", ("a" * 30 + "b") * 30, "c" * 1000])
def test_a_character_costs_two_steps_at_most_however_many_strings_there_are(text: str):
    few = StopStrings(["a" * 60])
    many = StopStrings(["a" * 60, *("b" * length + "a" * length + "x" for length in range(1, 30)), "cd", "dc"])
    for stops in (few, many):
        stops._next = Counted(stops._next)
        assert stops.feed(START, text) is not None
        # Each step back was paid for by a step forward before it.
        assert len(text) <= stops._next.asked <= 2 * len(text)


def test_the_pieces_of_a_text_are_the_whole_as_it_stands_behind_the_prompt(text: Text):
    rng = random.Random(0)
    pieces = {piece: text.encode(piece) if piece else [NO_TOKEN] for piece in PIECES}
    for _ in range(200):
        prompt, tokens = (
            [token for piece in rng.choices(PIECES, k=size) for token in pieces[piece]]
            for size in (rng.randint(2, 6), rng.randint(1, 12))
        )
        transcript = Transcript(text, prompt, None, keep=True)
        got = []
        for token in tokens:
            transcript.add(token)
            got.append(transcript.take(last=False))
        got.append(transcript.take(last=True))
        assert "".join(got) == behind(text, prompt, tokens)


def test_bytes_that_are_no_text_are_read_to_the_end(text: Text):
    rng = random.Random(0)
    for _ in range(50):
        transcript = Transcript(text, text.encode("xyz"), StopStrings(["no such"]), keep=True)
        for _ in range(60):
            assert not transcript.add(rng.randrange(tokens_of(text)))
        for token in text.encode("x"):
            transcript.add(token)
        assert "x" in transcript.take(last=True)[-5:]


def test_a_stop_ends_a_sample_with_the_token_that_completes_it(text: Text):
    rng = random.Random(1)
    found = 0
    for _ in range(300):
        strings = rng.sample(["any", " any", "xy", "xyz", " a", "é", "🎉", "<|end|>", "a b", "yx"], 3)
        prompt = text.encode("xyz")
        answer = rng.choice([" any", "any", " xyz", "xé🎉", "🎉", "a b", "x<|end|>y", "bcb"])
        tokens = text.encode(answer)
        tokens = [token for each in tokens for token in (each, *rng.choices([NO_TOKEN], k=rng.randrange(3)))]
        transcript = Transcript(text, prompt, StopStrings(strings), keep=False)
        got = next((place for place, token in enumerate(tokens) if transcript.add(token)), None)
        texts = (behind(text, prompt, tokens[: place + 1]) for place in range(len(tokens)))
        wanted = next((place for place, each in enumerate(texts) if any(stop in each for stop in strings)), None)
        assert got == wanted, (strings, answer)
        found += got is not None
    assert found > 50


@pytest.mark.parametrize("kind", [byte_fallback, metaspace])
def test_a_stop_that_begins_with_a_space_is_found_in_the_answers_first_word(
    kind: Callable[[Path], Text], tmp_path: Path
):
    text = kind(tmp_path)
    any_token = text._tokenizer.convert_tokens_to_ids("▁any")
    prompt = text._tokenizer.convert_tokens_to_ids(["x"])
    assert text.decode([any_token]) == "any"
    for nothing in ([], [NO_TOKEN] * 3, [NO_TOKEN] * 40):
        assert Transcript(text, prompt + nothing, StopStrings([" any"]), keep=False).add(any_token)


@pytest.mark.parametrize("num_without_text", [0, 1, 40])
def test_ids_without_text_hide_no_stop(text: Text, num_without_text: int):
    first, second = text.encode("xy")[-3:-1] if isinstance(text._tokenizer, ByT5Tokenizer) else text.encode("xy")[-2:]
    transcript = Transcript(text, text.encode("z"), StopStrings(["xy"]), keep=False)
    assert not transcript.add(first)
    for _ in range(num_without_text):
        assert not transcript.add(NO_TOKEN)
    assert transcript.add(second)


def test_a_prompt_that_ends_within_a_character_gives_it_to_the_answer(tmp_path: Path):
    text = byte_level(tmp_path)
    party = text.encode("🎉")
    assert len(party) == 4
    transcript = Transcript(text, text.encode("x") + party[:2], StopStrings(["🎉"]), keep=True)
    assert [transcript.add(token) for token in party[2:]] == [False, True]
    assert transcript.take(last=True) == "🎉"
    assert Transcript(text, text.encode("x") + party, None, keep=True).take(last=True) == ""


@pytest.mark.parametrize("what", ["no character", "no text", "words"])
def test_a_token_costs_the_same_however_long_the_sample_is(text: Text, what: str, monkeypatch: pytest.MonkeyPatch):
    lone = text.encode("é")[0]
    token = {"no character": lone, "no text": NO_TOKEN, "words": text.encode("x")[0]}[what]
    transcript = Transcript(text, text.encode("xyz"), StopStrings(["zzz"]), keep=False)
    longest, decode = 0, text.decode

    def counted(tokens: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return decode(tokens)

    monkeypatch.setattr(text, "decode", counted)
    for _ in range(500):
        transcript.add(token)
    assert longest < 50
