"""Checkpoints' files by URLs that need no key, as tinker's command line fetches them.

A URL holds a token that nobody can guess. What it stands for, the key of whoever asked for it among it, is in memory
alone: it ends with its time and with this gateway, and a client asks for others.
"""

import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc.aio
from gradwire.errors import from_rpc_error
from gradwire.v1.checkpoint_pb2 import Checkpoint, CheckpointFile
from gradwire.v1.checkpoint_service_pb2 import DownloadCheckpointRequest

from trainer_service.gateway.outcomes import Refusal
from trainer_service.gateway.trainers import Trainer, metadata

VALID_S = 3600.0
_MAX_OFFERS = 4096
"""The most that are kept; older ones make room."""


@dataclass(frozen=True)
class Offer:
    """One checkpoint, for whoever has its token."""

    trainer: Trainer
    key: str = field(repr=False)
    checkpoint: Checkpoint
    expires_s: float

    def file(self, name: str) -> CheckpointFile:
        """One of its files.

        Raises:
            Refusal: 404.
        """
        for file in self.checkpoint.files:
            if file.name == name:
                return file
        raise Refusal(404, f"The checkpoint has no file {name[:200]!r}.", reason="CHECKPOINT_NOT_FOUND")

    async def read(self, file: CheckpointFile) -> AsyncIterator[bytes]:
        """A file's bytes; of another that took its place meanwhile there are none.

        Raises:
            GradwireError: It cannot be read.
        """
        request = DownloadCheckpointRequest(path=self.checkpoint.path, file=file.name, sha256=file.sha256)
        call = self.trainer.checkpoints.DownloadCheckpoint(request, metadata=metadata(self.key))
        try:
            async for piece in call:
                yield piece.data
        except grpc.aio.AioRpcError as exc:
            raise from_rpc_error(exc) from None
        finally:
            call.cancel()


class Downloads:
    """What may be fetched, by token."""

    def __init__(self) -> None:
        self._offers: dict[str, Offer] = {}

    def offer(self, trainer: Trainer, key: str, checkpoint: Checkpoint) -> tuple[str, Offer]:
        """(token, offer) of a checkpoint, with its files, that the key may see."""
        now_s = time.time()
        self._offers = {token: one for token, one in self._offers.items() if one.expires_s > now_s}
        while len(self._offers) >= _MAX_OFFERS:
            del self._offers[next(iter(self._offers))]
        token = secrets.token_urlsafe(32)
        offer = self._offers[token] = Offer(trainer, key, checkpoint, now_s + VALID_S)
        return token, offer

    def find(self, token: str) -> Offer:
        """What a token stands for.

        Raises:
            Refusal: 404: nothing, or nothing any more.
        """
        offer = self._offers.get(token)
        if offer is None or offer.expires_s < time.time():
            text = "This URL is not valid, or not any more; get_external_weights_urls gives new ones."
            raise Refusal(404, text, reason="CHECKPOINT_NOT_FOUND")
        return offer
