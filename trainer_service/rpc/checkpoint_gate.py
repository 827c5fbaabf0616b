"""What operations that save or load pass on their way in and out: owners are written down, stores are asked.

It stands where calls come in, so that an answer is what the client gets: the run itself, its order and its journal know
only the local folder.
"""

import asyncio
import contextlib

from gradwire.errors import GradwireError
from gradwire.v1.trainer_service_pb2 import TrainResponse

from trainer_service.checkpoints.catalog import Catalog
from trainer_service.runs.operation import Operation
from trainer_service.runs.run import Run
from trainer_service.runs.sequence import error_response

_SAVES = ("save_state", "save_weights_for_sampler")


class CheckpointGate:
    """The way of saves and loads.

    Args:
        catalog: Where checkpoints are.
    """

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    async def before(self, run: Run, operation: Operation) -> None:
        """Before an operation takes its place; whoever calls must not overtake it meanwhile.

        What fails here is left for the operation itself to find, and to say in its answer.
        """
        if operation.kind in _SAVES:
            with contextlib.suppress(OSError):
                self._catalog.claim(run.run_id, run.owner)
        elif operation.kind == "load_state" and self._catalog.storage is not None:
            with contextlib.suppress(GradwireError):
                await asyncio.to_thread(self._catalog.fetch, operation.request.load_state.path)

    def stores(self, operation: Operation) -> bool:
        """Whether the answer to an operation must go through `after`."""
        return operation.kind in _SAVES and self._catalog.storage is not None

    async def after(self, operation: Operation, answer: bytes) -> bytes:
        """The answer to give: as it was once the checkpoint is in the store, or why it is not."""
        response = TrainResponse.FromString(answer)
        if response.WhichOneof("result") != operation.kind:
            return answer
        try:
            await asyncio.to_thread(self._catalog.store, getattr(response, operation.kind).path)
        except GradwireError as exc:
            exc.message += " The checkpoint is on the trainer's disk, and is stored as soon as that can be done."
            return error_response(operation.seq_id, exc).SerializeToString()
        return answer
