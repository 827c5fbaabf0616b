"""Runs and checkpoints under the names of tinker's RestClient."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal, TypeVar

from gradwire._client.answers import server_capabilities, server_info
from gradwire._client.async_twins import awaited
from gradwire._client.loop import LOOP
from gradwire._client.ported_names import RefusesTinkerNames, refuse_given
from gradwire._client.transport import Connection
from gradwire.checkpoint_client import check_ttl_seconds, time_of
from gradwire.errors import invalid_field
from gradwire.futures import APIFuture
from gradwire.types.run_info import ServerCapabilities
from gradwire.v1 import checkpoint_pb2, run_pb2
from gradwire.v1 import checkpoint_service_pb2 as checkpoints
from gradwire.v1 import trainer_service_pb2 as trainer
from gradwire.v1.checkpoint_service_pb2_grpc import CheckpointServiceStub
from gradwire.v1.trainer_service_pb2_grpc import TrainerServiceStub

T = TypeVar("T")

CheckpointType = Literal["training", "sampler"]
AccessScope = Literal["owned", "accessible"]

_NO_PROJECTS = "there are no projects; runs belong to the key that made them."
_STATE = checkpoint_pb2.CHECKPOINT_KIND_STATE


@dataclass(frozen=True)
class ListedCheckpoint:
    """A checkpoint, as tinker tells one; `ServiceClient.checkpoints` says more."""

    checkpoint_id: str
    """Its kind and name: "state/<name>" or "sampler_weights/<name>"."""
    checkpoint_type: CheckpointType
    """"training" for a resumable state, "sampler" for sampler weights."""
    time: datetime
    """When it was saved, UTC."""
    tinker_path: str
    """gradwire:// path, as saving returned it."""
    size_bytes: int
    """Size of all files."""
    user_metadata: Mapping[str, str]
    """What its owner wrote about it."""
    expires_at: datetime | None
    """When it is deleted, UTC; None for never."""
    public: bool = False
    """Always False: a checkpoint is its owner's alone."""

    @property
    def path(self) -> str:
        """gradwire:// path."""
        return self.tinker_path


@dataclass(frozen=True)
class Cursor:
    """Which part of a list an answer holds."""

    offset: int
    """Entries passed over."""
    limit: int
    """The most it may hold."""
    total_count: int
    """Entries of the whole list."""


@dataclass(frozen=True)
class CheckpointsListResponse:
    """A list of checkpoints."""

    checkpoints: list[ListedCheckpoint]
    """Newest first."""
    cursor: Cursor | None = None
    """Which part of the list these are; None for the whole."""


@dataclass(frozen=True)
class TrainingRun:
    """A run that is on the trainer, or of which there are checkpoints."""

    training_run_id: str
    """Identifier, unique on its trainer."""
    base_model: str
    """The model it started from, as the trainer was given it."""
    is_lora: bool
    """Whether only an adapter trains."""
    lora_rank: int | None
    """Rank of its adapter; None where all parameters train."""
    corrupted: bool
    """Whether it is lost: it could not be restored, and takes no more operations."""
    user_metadata: Mapping[str, str]
    """What its owner wrote about it."""
    created_at: datetime
    """When it was created, UTC."""
    last_checkpoint: ListedCheckpoint | None
    """Its newest resumable state; None where there is none."""
    last_sampler_checkpoint: ListedCheckpoint | None
    """Its newest sampler weights; None where there are none."""


@dataclass(frozen=True)
class TrainingRunsResponse:
    """A list of runs."""

    training_runs: list[TrainingRun]
    """Newest first."""
    cursor: Cursor
    """Which part of the list these are."""


@dataclass(frozen=True)
class WeightsInfoResponse:
    """What a client must be made with to load a checkpoint."""

    base_model: str
    """The model its run started from."""
    is_lora: bool
    """Whether it is of a LoRA run."""
    lora_rank: int | None
    """Rank of the adapter; None where all parameters train."""
    train_unembed: bool | None
    """Whether the head has an adapter; None where that is not known, or all parameters train."""
    train_mlp: bool | None
    """Whether the feed-forward layers have one; None likewise."""
    train_attn: bool | None
    """Whether the attention layers have one; None likewise."""


class RestClient(RefusesTinkerNames):
    """Made by ServiceClient.create_rest_client. Calls return a future at once; `…_async` twins give its answer.

    Where a call takes a `tinker_path`, it is a gradwire:// path, as saving returned it. Calls that name a run or a
    checkpoint fail with NotFoundError if there is none, or it is another owner's.
    """

    def __init__(self, connection: Connection, *, timeout_s: float) -> None:
        self._connection = connection
        self._timeout_s = timeout_s

    def get_server_capabilities(self) -> APIFuture[ServerCapabilities]:
        """The model the trainer serves; none while it is still loading."""

        async def ask() -> ServerCapabilities:
            found = await self._trainer("GetServerInfo", trainer.GetServerInfoRequest())
            return server_capabilities(server_info(found))

        return APIFuture(LOOP.submit(ask()), "get_server_capabilities")

    # ── runs ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def get_training_run(self, training_run_id: str, access_scope: AccessScope = "owned") -> APIFuture[TrainingRun]:
        """A run that is on the trainer.

        Args:
            training_run_id: The run.
            access_scope: Has no effect: a key sees its owner's runs, an admin's key sees all.
        """

        async def ask() -> TrainingRun:
            answer = await self._trainer("GetRun", trainer.GetRunRequest(run_id=training_run_id))
            return _run(answer.run, await self._listed(training_run_id))

        return APIFuture(LOOP.submit(ask()), "get_training_run")

    def get_training_run_by_tinker_path(
        self, tinker_path: str, access_scope: AccessScope = "owned"
    ) -> APIFuture[TrainingRun]:
        """The run that saved a checkpoint."""
        run_id, _, _ = _split(tinker_path)
        return self.get_training_run(run_id, access_scope)

    def list_training_runs(
        self, limit: int = 20, offset: int = 0, access_scope: AccessScope = "owned", project_id: str | None = None
    ) -> APIFuture[TrainingRunsResponse]:
        """Runs that are on the trainer, newest first.

        Args:
            limit: The most entries to return.
            offset: Number of entries to skip.
            access_scope: As in get_training_run.
            project_id: Must be None.
        """
        refuse_given(_NO_PROJECTS, project_id=project_id)

        async def ask() -> TrainingRunsResponse:
            answer = await self._trainer("ListRuns", trainer.ListRunsRequest())
            part, cursor = _part(answer.runs, limit, offset)
            listed = await self._listed("")
            return TrainingRunsResponse([_run(run, listed) for run in part], cursor)

        return APIFuture(LOOP.submit(ask()), "list_training_runs")

    # ── checkpoints ───────────────────────────────────────────────────────────────────────────────────────────────

    def list_checkpoints(self, training_run_id: str) -> APIFuture[CheckpointsListResponse]:
        """A run's checkpoints, newest first; also those of a run that was deleted."""
        return self._list("list_checkpoints", training_run_id, None)

    def list_user_checkpoints(self, limit: int = 100, offset: int = 0) -> APIFuture[CheckpointsListResponse]:
        """Checkpoints of all runs, newest first.

        Args:
            limit: The most entries to return.
            offset: Number of entries to skip.
        """
        return self._list("list_user_checkpoints", "", (limit, offset))

    def get_weights_info_by_tinker_path(self, tinker_path: str) -> APIFuture[WeightsInfoResponse]:
        """What a client must be made with to load a checkpoint; create_training_client_from_state does so by itself."""

        async def ask() -> WeightsInfoResponse:
            request = checkpoints.GetCheckpointRequest(path=tinker_path)
            found = (await self._checkpoints("GetCheckpoint", request)).checkpoint
            layers = {name: getattr(found.lora, name) for name in ("train_unembed", "train_mlp", "train_attn")}
            if not found.HasField("lora"):
                layers = dict.fromkeys(layers)
            return WeightsInfoResponse(
                base_model=found.base_model,
                is_lora=found.lora_rank > 0,
                lora_rank=found.lora_rank or None,
                **layers,
            )

        return APIFuture(LOOP.submit(ask()), "get_weights_info_by_tinker_path")

    def delete_checkpoint(self, training_run_id: str, checkpoint_id: str) -> APIFuture[None]:
        """Deletes a checkpoint for good.

        Args:
            training_run_id: The run that saved it.
            checkpoint_id: "state/<name>" or "sampler_weights/<name>", as lists tell it.
        """
        return self.delete_checkpoint_from_tinker_path(f"gradwire://{training_run_id}/{checkpoint_id}")

    def delete_checkpoint_from_tinker_path(self, tinker_path: str) -> APIFuture[None]:
        """Deletes a checkpoint for good.

        Raises:
            FailedPreconditionError: Through the future. CHECKPOINT_IN_USE: deltas build on it; delete them first.
        """
        request = checkpoints.DeleteCheckpointRequest(path=tinker_path)
        return self._done("delete_checkpoint", "DeleteCheckpoint", request)

    def set_checkpoint_ttl_from_tinker_path(self, tinker_path: str, ttl_seconds: int | None) -> APIFuture[None]:
        """Sets how long a checkpoint is kept from now, seconds; None keeps it for ever."""
        request = checkpoints.SetCheckpointTtlRequest(path=tinker_path, ttl_seconds=check_ttl_seconds(ttl_seconds))
        return self._done("set_checkpoint_ttl", "SetCheckpointTtl", request)

    get_training_run_async = awaited(get_training_run)
    get_training_run_by_tinker_path_async = awaited(get_training_run_by_tinker_path)
    list_training_runs_async = awaited(list_training_runs)
    list_checkpoints_async = awaited(list_checkpoints)
    list_user_checkpoints_async = awaited(list_user_checkpoints)
    delete_checkpoint_async = awaited(delete_checkpoint)
    delete_checkpoint_from_tinker_path_async = awaited(delete_checkpoint_from_tinker_path)
    set_checkpoint_ttl_from_tinker_path_async = awaited(set_checkpoint_ttl_from_tinker_path)

    # ── inside ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _trainer(self, method: str, request: Any) -> Any:
        return await self._connection.call_async(TrainerServiceStub, method, request, self._timeout_s)

    async def _checkpoints(self, method: str, request: Any) -> Any:
        return await self._connection.call_async(CheckpointServiceStub, method, request, self._timeout_s)

    async def _listed(self, run_id: str) -> list[checkpoint_pb2.Checkpoint]:
        answer = await self._checkpoints("ListCheckpoints", checkpoints.ListCheckpointsRequest(run_id=run_id))
        return list(answer.checkpoints)

    def _list(self, what: str, run_id: str, part: tuple[int, int] | None) -> APIFuture[CheckpointsListResponse]:
        async def ask() -> CheckpointsListResponse:
            found = await self._listed(run_id)
            if part is None:
                return CheckpointsListResponse([_checkpoint(each) for each in found])
            some, cursor = _part(found, *part)
            return CheckpointsListResponse([_checkpoint(each) for each in some], cursor)

        return APIFuture(LOOP.submit(ask()), what)

    def _done(self, what: str, method: str, request: Any) -> APIFuture[None]:
        async def ask() -> None:
            await self._checkpoints(method, request)

        return APIFuture(LOOP.submit(ask()), what)


def _part(found: Sequence[T], limit: int, offset: int) -> tuple[list[T], Cursor]:
    for name, value in (("limit", limit), ("offset", offset)):
        if type(value) is not int or value < 0:
            raise invalid_field(name, f"is {value!r}; it must be a whole number, at least 0.")
    return list(found[offset : offset + limit]), Cursor(offset, limit, len(found))


def _split(path: str) -> tuple[str, str, str]:
    """(run id, kind, name) of a gradwire:// path."""
    parts = path.removeprefix("gradwire://").split("/")
    if not path.startswith("gradwire://") or len(parts) != 3:
        raise invalid_field("tinker_path", f"is {path[:200]!r}; it must be a gradwire:// path, as saving returned it.")
    return parts[0], parts[1], parts[2]


def _checkpoint(found: checkpoint_pb2.Checkpoint) -> ListedCheckpoint:
    return ListedCheckpoint(
        checkpoint_id=found.path.removeprefix(f"gradwire://{found.run_id}/"),
        checkpoint_type="training" if found.kind == _STATE else "sampler",
        time=time_of(found, "created_at"),
        tinker_path=found.path,
        size_bytes=found.size_bytes,
        user_metadata=dict(found.user_metadata),
        expires_at=time_of(found, "expires_at") if found.HasField("expires_at") else None,
    )


def _run(run: run_pb2.Run, listed: Iterable[checkpoint_pb2.Checkpoint]) -> TrainingRun:
    own = [each for each in listed if each.run_id == run.run_id]
    states = [each for each in own if each.kind == _STATE]
    samplers = [each for each in own if each.kind != _STATE]
    return TrainingRun(
        training_run_id=run.run_id,
        base_model=run.base_model,
        is_lora=run.lora_rank > 0,
        lora_rank=run.lora_rank or None,
        corrupted=run.state == run_pb2.RUN_STATE_LOST,
        user_metadata=dict(run.user_metadata),
        created_at=time_of(run, "created_at"),
        last_checkpoint=_checkpoint(states[0]) if states else None,
        last_sampler_checkpoint=_checkpoint(samplers[0]) if samplers else None,
    )
