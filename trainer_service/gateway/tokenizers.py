"""Tokenizers of the served models, fetched from their trainers: text, and conversations as a model reads them.

Only `tokenizers` and Jinja are needed for it, so no torch.
"""

import asyncio
import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import grpc.aio
from gradwire._wire.tokenizer_files import may_be_of_a_tokenizer
from gradwire.errors import from_rpc_error
from gradwire.v1.trainer_service_pb2 import DownloadTokenizerRequest, GetTokenizerRequest
from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from trainer_service.gateway.outcomes import Refusal
from trainer_service.gateway.trainers import Trainer, metadata

_MAX_BYTES = 256 << 20
_NAMES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class ModelTokenizer:
    """One model's tokenizer.

    Args:
        files: Its files, by name.

    Raises:
        Refusal: They cannot be read here.
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        if "tokenizer.json" not in files:
            raise Refusal(
                400, "This model has no tokenizer.json, so its text cannot be read here; use tokens and asample."
            )
        try:
            self._tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
            config: dict[str, Any] = json.loads(files.get("tokenizer_config.json", b"{}"))
        except Exception as exc:
            raise Refusal(400, f"This model's tokenizer cannot be read: {exc}.") from exc
        self._special = {
            name: _special(config.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        }
        self._template = _template(files, config)

    @property
    def eos_ids(self) -> list[int]:
        """Tokens that end a text."""
        found = self._tokenizer.token_to_id(self._special["eos_token"] or "")
        return [] if found is None else [found]

    def encode(self, text: str, *, beginning: bool = True) -> list[int]:
        """Token ids; with `beginning`, what the tokenizer puts there of its own accord."""
        return self._tokenizer.encode(text, add_special_tokens=beginning).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Their text, without special tokens."""
        return self._tokenizer.decode(list(tokens), skip_special_tokens=True)

    def token_text(self, token: int) -> str:
        """One token's own text, special ones too."""
        return self._tokenizer.decode([token], skip_special_tokens=False)

    def chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """A conversation as the model's chat template writes it, up to where the assistant speaks.

        Raises:
            Refusal: The model has no template, or it does not take these messages.
        """
        if self._template is None:
            raise Refusal(400, "This model has no chat template; use /completions with a prompt of your own.")
        special = {name: text for name, text in self._special.items() if text is not None}
        try:
            text = _ENVIRONMENT.from_string(self._template).render(
                messages=messages, add_generation_prompt=True, tools=None, documents=None, **special
            )
        except TemplateError as exc:
            raise Refusal(400, f"The model's chat template does not take these messages: {exc}.") from exc
        return self.encode(text, beginning=False)


def _special(found: Any) -> str | None:
    return found.get("content") if isinstance(found, dict) else found


def _template(files: dict[str, bytes], config: dict[str, Any]) -> str | None:
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode()
    found = config.get("chat_template")
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found}
        return named.get("default")
    return found


def _raise(message: str) -> None:
    raise TemplateError(message)


def _environment() -> ImmutableSandboxedEnvironment:
    """As transformers renders templates."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    return environment


_ENVIRONMENT = _environment()


class GrowingText:
    """The text of tokens as they come; a character is told once all its bytes are there.

    Args:
        tokenizer: Whose tokens they are.
        stop: Texts that end it, and are left out of it.
    """

    def __init__(self, tokenizer: ModelTokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = [one for one in stop if one]
        self._tokens: list[int] = []
        self._told = ""
        self.stopped = False

    def add(self, tokens: Sequence[int], *, last: bool) -> str:
        """The text that is new with these tokens.

        Args:
            tokens: The next ones.
            last: Whether no more come.
        """
        if self.stopped:
            return ""
        self._tokens += tokens
        text = self._tokenizer.decode(self._tokens)
        ends = [place for place in map(text.find, self._stop) if place >= 0]
        if ends:
            text, self.stopped = text[: min(ends)], True
        elif not last:
            text = text[: len(text.rstrip(_INCOMPLETE)) - self._may_begin(text.rstrip(_INCOMPLETE))]
        if not text.startswith(self._told):
            # A decoder that changed its mind about what was told; only what is longer can still be told.
            text = self._told + text[len(self._told) :]
        new, self._told = text[len(self._told) :], text
        return new

    def _may_begin(self, text: str) -> int:
        """How many of the last characters may be the beginning of a stop."""
        return max(
            (n for stop in self._stop for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])),
            default=0,
        )


class Tokenizers:
    """Tokenizers by trainer, each fetched once for as long as its files stay what they are."""

    def __init__(self) -> None:
        self._loaded: dict[str, tuple[tuple[str, ...], ModelTokenizer]] = {}

    async def of(self, trainer: Trainer, key: str) -> ModelTokenizer:
        """The tokenizer of a trainer's model.

        Raises:
            Refusal: It cannot be read here.
        """
        answer = await trainer.call(trainer.runs.GetTokenizer, GetTokenizerRequest(), key)
        files = [file for file in answer.files if file.name in _NAMES and may_be_of_a_tokenizer(file.name)]
        digests = tuple(sorted(f"{file.name} {file.sha256}" for file in files))
        loaded = self._loaded.get(trainer.url)
        if loaded is None or loaded[0] != digests:
            contents = {file.name: await self._fetch(trainer, file.name, key) for file in files}
            loaded = self._loaded[trainer.url] = digests, await asyncio.to_thread(ModelTokenizer, contents)
        return loaded[1]

    async def _fetch(self, trainer: Trainer, name: str, key: str) -> bytes:
        data = bytearray()
        call = trainer.runs.DownloadTokenizer(DownloadTokenizerRequest(file=name), metadata=metadata(key))
        try:
            async for piece in call:
                data += piece.data
                if len(data) > _MAX_BYTES:
                    raise Refusal(400, "This model's tokenizer is too large.")
        except grpc.aio.AioRpcError as exc:
            raise from_rpc_error(exc) from None
        finally:
            call.cancel()
        return bytes(data)
