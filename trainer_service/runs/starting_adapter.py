"""The adapter that a new LoRA run starts from: where it is, and whether the run may start from it."""

from pathlib import Path

from gradwire.errors import invalid_field
from gradwire.v1.trainer_service_pb2 import CreateRunRequest

from trainer_service.adapter_folders import adapter_folder, adapter_rank, is_checkpoint
from trainer_service.checkpoints.transfers import Transfers


async def find_starting_adapter(
    request: CreateRunRequest, *, transfers: Transfers, adapter_dir: Path
) -> tuple[Path, int]:
    """The folder of the adapter that a request names, and its LoRA rank.

    Args:
        request: With an adapter_path; a lora_rank of 0 takes the adapter's.
        transfers: Fetches the adapter if it is a checkpoint that is only in the store.
        adapter_dir: Where adapters are that are no checkpoints.

    Raises:
        InvalidArgumentError: INVALID_FIELD: there is no such adapter, or it has another rank.
        GradwireError: As Transfers.fetch.
    """
    path = request.adapter_path
    if is_checkpoint(path):
        await transfers.fetch(path, field="adapter_path")
    folder = adapter_folder(path, checkpoint_dir=transfers.catalog.root, adapter_dir=adapter_dir)
    rank = adapter_rank(folder, path)
    if request.lora_rank not in (0, rank):
        raise invalid_field(
            "lora_rank", f"is {request.lora_rank}, but the adapter at {path} has rank {rank}; leave it out."
        )
    return folder, rank
