"""Between text and tokens, for requests typed by hand and for stops given as text."""

from pathlib import Path
from typing import Any

from gradwire.errors import invalid_field

from trainer_service.engine.sampling.stops import START, StopStrings

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What a decoder puts where the bytes of a character are not all there yet."""
_MAX_PENDING = 16
"""Tokens without certain text that are decoded again with the next one; a character needs four at most."""


class Text:
    """A model's tokenizer. One thread may encode while another decodes.

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
        # The first call settles truncation and padding; changing them later would collide with a thread that decodes.
        self.encode("a")

    def encode(self, text: str) -> list[int]:
        """Token ids, with what the tokenizer puts at a beginning of its own accord."""
        # Not verbose: a prompt too long for the model is refused by us, in words of our own.
        return self._tokenizer(text, verbose=False)["input_ids"]

    def decode(self, tokens: list[int]) -> str:
        """Their text, special tokens included. Ids that no token has, as padded vocabularies do, have none."""
        if not self._tokenizer.is_fast:
            # Only those in Rust pass such ids over by themselves.
            known = [token for token in tokens if token < len(self._tokenizer)]
            names = self._tokenizer.convert_ids_to_tokens(known)
            tokens = [token for token, name in zip(known, names, strict=True) if name is not None]
        return self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class Transcript:
    """The text of one sample as it grows, as it stands behind the prompt.

    A decoder drops the space before a first word, and knows a character by all its bytes. So each token is decoded
    behind a few before it, which have text, and what those few gave is left out.

    Args:
        text: The tokenizer.
        prompt: Token ids that the sample continues.
        stop_strings: What ends it; None for nothing.
        keep: Whether `take` is called; without it text is let go at once.
    """

    def __init__(self, text: Text, prompt: list[int], stop_strings: StopStrings | None, *, keep: bool) -> None:
        self._text = text
        self._stop_strings = stop_strings
        self._state = START
        self._keep = keep
        self._untaken: list[str] = []
        self._tokens = _last_with_text(text, prompt)
        """The few before the next token, and those whose text is not certain yet."""
        self._num_context = len(self._tokens)
        """Those of them that are there only so that what follows is decoded right."""
        self._num_read = len(text.decode(self._tokens).rstrip(_INCOMPLETE))
        """Characters of their text that were read."""

    def add(self, token: int) -> bool:
        """Takes the next token in. Returns whether it completes a stop string."""
        self._tokens.append(token)
        decoded = self._text.decode(self._tokens)
        certain = decoded.rstrip(_INCOMPLETE)
        new = certain[self._num_read :]
        self._num_read += len(new)
        pending = self._tokens[self._num_context :]
        if new and certain == decoded:
            self._go_on_behind(pending)
        elif len(pending) > _MAX_PENDING:
            if certain == decoded:
                # Without text; the last of them may still be bytes of a character that a decoder does not show yet.
                self._tokens = self._tokens[: self._num_context] + pending[1:]
            else:
                new += decoded[self._num_read :]
                self._go_on_behind(pending)
        return self._read(new)

    def take(self, *, last: bool) -> str:
        """Text that has come since the last call; bytes of an incomplete character wait, but not for ever."""
        if last:
            self._untaken.append(self._text.decode(self._tokens)[self._num_read :])
        taken, self._untaken = "".join(self._untaken), []
        return taken

    def _read(self, new: str) -> bool:
        if self._keep and new:
            self._untaken.append(new)
        if self._stop_strings is None:
            return False
        state = self._stop_strings.feed(self._state, new)
        if state is None:
            return True
        self._state = state
        return False

    def _go_on_behind(self, tokens: list[int]) -> None:
        """Makes tokens that were read to the end the context of what follows, if they have text."""
        decoded = self._text.decode(tokens)
        if decoded:
            self._tokens, self._num_context, self._num_read = tokens, len(tokens), len(decoded)


def _last_with_text(text: Text, tokens: list[int]) -> list[int]:
    """The last tokens that have any certain text between them."""
    count = 1
    while count < len(tokens) and not text.decode(tokens[-count:]).rstrip(_INCOMPLETE):
        count *= 2
    return tokens[-count:]
