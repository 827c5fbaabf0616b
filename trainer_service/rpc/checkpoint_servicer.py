"""CheckpointService: translates and delegates. Disks and stores are accessed on threads."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from gradwire.v1 import checkpoint_pb2 as messages
from gradwire.v1 import checkpoint_service_pb2 as pb
from gradwire.v1.checkpoint_service_pb2_grpc import CheckpointServiceServicer

from trainer_service.checkpoints.catalog import Catalog
from trainer_service.checkpoints.checkpoint import Checkpoint
from trainer_service.field_limits import check_ttl_seconds
from trainer_service.paths import SAMPLER_WEIGHTS, STATE
from trainer_service.served_model import ServedModel
from trainer_service.user_metadata import read_user_metadata

_KINDS = {
    messages.CHECKPOINT_KIND_UNSPECIFIED: "",
    messages.CHECKPOINT_KIND_STATE: STATE,
    messages.CHECKPOINT_KIND_SAMPLER_WEIGHTS: SAMPLER_WEIGHTS,
}
_TYPES = {"base": messages.CHECKPOINT_TYPE_BASE, "delta": messages.CHECKPOINT_TYPE_DELTA}
_MESSAGE_BYTES = 1 << 20


class CheckpointServicer(CheckpointServiceServicer):
    """Serves a trainer's checkpoints to those who may see them.

    Args:
        catalog: The checkpoints.
        base_model: The model that the trainer serves.
    """

    def __init__(self, catalog: Catalog, base_model: ServedModel) -> None:
        self._catalog = catalog
        self._base_model = base_model

    async def ListCheckpoints(self, request: pb.ListCheckpointsRequest, context: Any) -> pb.ListCheckpointsResponse:
        # A newer client may name a kind that no checkpoint here has.
        kind = _KINDS.get(request.kind, "unknown")
        found = await asyncio.to_thread(self._catalog.list, run_id=request.run_id, kind=kind)
        return pb.ListCheckpointsResponse(checkpoints=[_message(checkpoint, self._base_model) for checkpoint in found])

    async def GetCheckpoint(self, request: pb.GetCheckpointRequest, context: Any) -> pb.GetCheckpointResponse:
        found = await asyncio.to_thread(self._catalog.find, request.path)
        return pb.GetCheckpointResponse(checkpoint=_message(found, self._base_model, files=True))

    async def DeleteCheckpoint(self, request: pb.DeleteCheckpointRequest, context: Any) -> pb.DeleteCheckpointResponse:
        await asyncio.to_thread(self._catalog.delete, request.path)
        return pb.DeleteCheckpointResponse()

    async def SetCheckpointTtl(self, request: pb.SetCheckpointTtlRequest, context: Any) -> pb.SetCheckpointTtlResponse:
        ttl_seconds = request.ttl_seconds if request.HasField("ttl_seconds") else None
        check_ttl_seconds(ttl_seconds)
        changed = await asyncio.to_thread(self._catalog.set_ttl, request.path, ttl_seconds)
        return pb.SetCheckpointTtlResponse(checkpoint=_message(changed, self._base_model))

    async def DownloadCheckpoint(
        self, request: pb.DownloadCheckpointRequest, context: Any
    ) -> AsyncIterator[pb.DownloadCheckpointResponse]:
        found = await asyncio.to_thread(self._catalog.find, request.path)
        pieces = await asyncio.to_thread(
            self._catalog.open, found, request.file, offset=request.offset, sha256=request.sha256
        )
        offset = request.offset
        try:
            while piece := await asyncio.to_thread(next, pieces, b""):
                for start in range(0, len(piece), _MESSAGE_BYTES):
                    data = piece[start : start + _MESSAGE_BYTES]
                    yield pb.DownloadCheckpointResponse(offset=offset, data=data)
                    offset += len(data)
        finally:
            # It cannot close while a thread still reads the last piece; then it closes with its last reference.
            with contextlib.suppress(ValueError):
                pieces.close()


def _message(checkpoint: Checkpoint, model: ServedModel, *, files: bool = False) -> messages.Checkpoint:
    """A checkpoint as a message."""
    path, manifest = checkpoint.path, checkpoint.manifest
    about = manifest.about
    made = messages.Checkpoint(
        path=str(path),
        run_id=path.run_id,
        kind=messages.CHECKPOINT_KIND_STATE if path.kind == STATE else messages.CHECKPOINT_KIND_SAMPLER_WEIGHTS,
        name=path.name,
        size_bytes=manifest.size_bytes,
        step=about.get("step") or 0,
        base_model=model.told(about.get("base_model") or ""),
        architecture=about.get("architecture") or "",
        lora_rank=about.get("lora_rank") or 0,
        checkpoint_type=_TYPES.get(about.get("checkpoint_type") or "", messages.CHECKPOINT_TYPE_BASE),
        base_path=checkpoint.base_path,
        dtype=about.get("dtype") or "",
        user_metadata=read_user_metadata(about.get("user_metadata")),
    )
    if lora := about.get("lora"):
        flags = {name: lora[name] for name in ("train_mlp", "train_attn", "train_unembed")}
        made.lora.CopyFrom(messages.LoraLayout(lora_alpha=lora["alpha"], **flags))
        made.lora.adapted.extend((lora.get("adapted") or "").split())
        made.lora.left_out.extend((lora.get("left_out") or "").split())
    made.created_at.FromDatetime(checkpoint.created_at)
    if checkpoint.expires_at is not None:
        made.expires_at.FromDatetime(checkpoint.expires_at)
    if files:
        for name, entry in sorted(manifest.files.items()):
            made.files.add(name=name, size_bytes=entry.size_bytes, sha256=entry.sha256)
    return made
