"""The trainers behind the gateway: a channel to each, and the models they serve by every name.

A call carries the key of whoever asked for it, so the trainer decides what they may see; the gateway has no key of its
own.
"""

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import grpc
import grpc.aio
from gradwire._wire.channels import open_channel, parse_base_url
from gradwire._wire.protocol_version import PROTOCOL_VERSION
from gradwire.errors import GradwireError, from_rpc_error
from gradwire.v1.checkpoint_service_pb2_grpc import CheckpointServiceStub
from gradwire.v1.sampling_service_pb2_grpc import SamplingServiceStub
from gradwire.v1.trainer_service_pb2 import GetServerInfoRequest, GetServerInfoResponse
from gradwire.v1.trainer_service_pb2_grpc import TrainerServiceStub

from trainer_service.command_lines import SettingsError
from trainer_service.gateway.outcomes import Refusal
from trainer_service.gateway.retries import is_passing
from trainer_service.tracing import trace_headers

CALL_TIMEOUT_S = 120.0
_AWAY_S = 60.0
"""How long a trainer may be away, as one that restarts is, before a call that somebody waits for fails."""


class Trainer:
    """One trainer.

    Args:
        url: "http://host:port", "https://host" or "unix:/path".
        ca_file: Roots that its certificate must come from; None takes the system's.

    Raises:
        SettingsError: The URL leads nowhere.
        OSError: The file cannot be read.
    """

    def __init__(self, url: str, *, ca_file: Path | None = None) -> None:
        self.url = url
        try:
            target, secure = parse_base_url(url, what="--trainer")
        except ValueError as exc:
            raise SettingsError(str(exc)) from exc
        roots = None if ca_file is None else ca_file.read_bytes()
        self.channel = open_channel(target, grpc.ssl_channel_credentials(roots) if secure else None)
        # grpc's stubs are made for synchronous channels, as far as their types say.
        self.runs: Any = TrainerServiceStub(self.channel)
        self.checkpoints: Any = CheckpointServiceStub(self.channel)
        self.sampling: Any = SamplingServiceStub(self.channel)

    async def call(self, method: Any, request: Any, key: str, *, away_s: float = _AWAY_S) -> Any:
        """A unary call on somebody's behalf, and in their trace, tried again while the trainer is away.

        Args:
            method: Of one of the stubs.
            request: Its message.
            key: The caller's; "" for none.
            away_s: How long to try.

        Raises:
            GradwireError: The call was refused.
        """
        until_s = time.monotonic() + away_s
        delay_s = 0.05
        while True:
            try:
                return await method(request, metadata=metadata(key, trace_headers.get()), timeout=CALL_TIMEOUT_S)
            except grpc.aio.AioRpcError as exc:
                failed = from_rpc_error(exc)
            if not is_passing(failed) or time.monotonic() + delay_s > until_s:
                raise failed
            await asyncio.sleep(delay_s)
            delay_s = min(1.0, delay_s * 2)


def metadata(key: str, trace: Mapping[str, str] = MappingProxyType({})) -> list[tuple[str, str]]:
    """What a call carries beside its message.

    Args:
        key: The caller's; "" for none.
        trace: The caller's trace context, as headers.
    """
    carried = [("gradwire-protocol-version", str(PROTOCOL_VERSION)), *trace.items()]
    return [*carried, ("authorization", f"Bearer {key}")] if key else carried


@dataclass(frozen=True)
class TrainerModel:
    """A model that can be named, and where it is."""

    trainer: Trainer
    name: str
    """Its name as clients know it."""
    base_model: str
    """Its name as the trainer knows it."""
    info: GetServerInfoResponse
    """What the trainer said of itself."""

    @property
    def max_context_length(self) -> int | None:
        """Its longest sequence in tokens."""
        return next((one.max_context_length for one in self.info.models if one.base_model == self.base_model), None)


class Trainers:
    """All trainers, and the names of what they serve.

    Args:
        trainers: The trainers.
        aliases: Further names of models, each to the trainer's own name; "" as that means the one model there is.
    """

    def __init__(self, trainers: Sequence[Trainer], aliases: Mapping[str, str] | None = None) -> None:
        self.all = tuple(trainers)
        self._aliases = dict(aliases or {})

    def by_url(self, url: str) -> Trainer:
        """The trainer of this URL, on which something was begun.

        Raises:
            Refusal: The gateway was restarted without it.
        """
        for trainer in self.all:
            if trainer.url == url:
                return trainer
        raise Refusal(404, f"This was begun on trainer {url}, which this gateway does not stand before any more.")

    async def served(self, key: str) -> list[TrainerModel]:
        """Every model by every name that the caller may see.

        Raises:
            GradwireError: The key is not valid, or no trainer can be reached.
        """
        answers = await asyncio.gather(
            *(trainer.call(trainer.runs.GetServerInfo, GetServerInfoRequest(), key) for trainer in self.all),
            return_exceptions=True,
        )
        found: list[TrainerModel] = []
        for trainer, answer in zip(self.all, answers, strict=True):
            if isinstance(answer, BaseException):
                if len(self.all) == 1 or not isinstance(answer, GradwireError) or not is_passing(answer):
                    raise answer
                continue
            for model in answer.models:
                names = dict.fromkeys([*self._names(model.base_model), *model.aliases])
                found += [TrainerModel(trainer, name, model.base_model, answer) for name in names]
        return found

    def name_of(self, base_model: str) -> str:
        """The name under which clients are told of a trainer's model."""
        return self._names(base_model)[0]

    def _names(self, base_model: str) -> list[str]:
        aliases = [name for name, of in self._aliases.items() if of in ("", base_model)]
        return [*aliases, base_model]

    async def find(self, base_model: str, key: str) -> TrainerModel:
        """The model of a name; "" is the only one there is.

        Raises:
            Refusal: 404: no model has that name; the message lists the names there are.
            GradwireError: As `served`.
        """
        served = await self.served(key)
        for model in served:
            if base_model in (model.name, ""):
                return model
        names = ", ".join(sorted({model.name for model in served})) or "none, the trainer is still loading"
        text = f"base_model is {base_model[:200]!r}, which no trainer behind this gateway serves; served: {names}."
        raise Refusal(404 if served else 503, text, reason="BASE_MODEL_MISMATCH")

    async def close(self) -> None:
        """Closes all channels."""
        await asyncio.gather(*(trainer.channel.close() for trainer in self.all))
