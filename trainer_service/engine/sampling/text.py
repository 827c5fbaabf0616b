"""Between text and tokens, for requests typed by hand and for stops given as text."""

from pathlib import Path
from typing import Any

from gradwire.errors import invalid_field

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a decoder puts where the bytes of a character are not all there yet."""


class Text:
    """A model's tokenizer.

    Args:
        folder: Of the model.

    Raises:
        InvalidArgumentError: INVALID_FIELD: it has none that can be read.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError) as exc:
            why = str(exc).strip().partition("\n")[0]
            raise invalid_field(
                "prompt_text",
                f"and stop strings need a tokenizer, and this model's cannot be read ({why}); send tokens.",
            ) from exc

    def encode(self, text: str) -> list[int]:
        """Token ids, with what the tokenizer puts at a beginning of its own accord."""
        return self._tokenizer(text)["input_ids"]

    def decode(self, tokens: list[int]) -> str:
        """Their text, special tokens included."""
        return self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class Transcript:
    """The text of one sample as it grows.

    Args:
        text: The tokenizer.
        stop_strings: What ends it.
    """

    def __init__(self, text: Text, stop_strings: tuple[str, ...]) -> None:
        self._text = text
        self._stop_strings = stop_strings
        self._sent = 0

    def stops(self, tokens: list[int]) -> bool:
        """Whether a stop string is complete in the text of all tokens so far."""
        if not self._stop_strings:
            return False
        # A token is at least a byte: what is further back than the longest string was looked at before.
        reach = max(len(string.encode()) for string in self._stop_strings) + 8
        tail = self._text.decode(tokens[-reach:])
        return any(string in tail for string in self._stop_strings)

    def unsent(self, tokens: list[int], *, last: bool) -> str:
        """Text that has come since the last call; bytes of an incomplete character wait, but not for ever."""
        text = self._text.decode(tokens)
        if text.endswith(_INCOMPLETE) and not last:
            return ""
        new, self._sent = text[self._sent :], len(text)
        return new
