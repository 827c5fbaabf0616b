"""What the device thread of a rank does: operations in their order, and as long as each took, sampling after it.

The leader takes what comes next from its inbox and tells the other ranks whose turn it is; they have the same commands
in theirs, and do the same. Requests to sample are divided: each is one rank's, whose model is whole by then, so that no
rank waits for another within a step; where there is no room for that, all are the leader's (sampling/in_parts.py).
After it the leader is handed what the others have to answer.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from gradwire.v1.worker_service_pb2 import WorkerCommand, WorkerEvent

from trainer_service.engine.rank_channels import LeaderGoneError, Ranks
from trainer_service.engine.sampling.service import Sampling
from trainer_service.engine.worker.commands import Commands
from trainer_service.engine.worker.inbox import Inbox
from trainer_service.engine.worker.prepared import Prepared
from trainer_service.executing import Executing

_OPERATION, _OVERTAKES, _SAMPLE, _END = "operation", "overtakes", "sample", "end"
_SIZE_BYTES = 4


class DeviceLoop:
    """The device thread's work on one rank.

    Args:
        ranks: Who does it together.
        inbox: Commands, the same on each rank.
        commands: Execute them.
        sampling: Of this rank.
        executing: Where the leader notes what it executes; None for another rank.
        outbox: Gets what this rank's samples have to answer, where it does not lead.
    """

    def __init__(
        self,
        ranks: Ranks,
        *,
        inbox: Inbox[WorkerCommand, Prepared],
        commands: Commands,
        sampling: Sampling,
        executing: Executing | None,
        outbox: list[WorkerEvent],
    ) -> None:
        self._ranks = ranks
        self._inbox = inbox
        self._commands = commands
        self._sampling = sampling
        self._executing = executing
        self._outbox = outbox
        self._elsewhere: dict[int, int] = {}
        """The rank of each sample command that another rank works on, by command_id."""

    def lead(self, send: Callable[[WorkerEvent], object], gone: Callable[[], bool]) -> None:
        """Rank 0's, until there are no more commands.

        Args:
            send: Sends an answer to the trainer.
            gone: Whether nobody waits for answers any more.
        """
        generation = self._sampling.generation
        while not self._inbox.ended:
            prepared, in_turn = self._inbox.take(wait=not (generation.busy or self._elsewhere))
            if gone():
                continue
            if prepared is None:
                self._sample(0, send)
                continue
            rank = self._place(prepared) if prepared.what == "sample" else 0
            self._tell(_OPERATION if in_turn else _OVERTAKES, rank)
            started_s = time.monotonic()
            if self._executing is not None:
                self._executing.begin(prepared.command_id, prepared.run_id, prepared.seq_id)
            event = self._execute(prepared, rank)
            if self._executing is not None:
                self._executing.end()
            if event is not None:
                self._elsewhere.pop(prepared.command_id, None)
                send(event)
            if in_turn and (generation.busy or self._elsewhere):
                self._sample(time.monotonic() - started_s, send)
        self._tell(_END)

    def follow(self) -> None:
        """Every other rank's, until the leader says that there is no more.

        Raises:
            LeaderGoneError: It has ended without a word.
        """
        while True:
            try:
                turn, number = self._ranks.turns.tell()
            except RuntimeError as exc:
                # Nothing else ends a wait without end.
                raise LeaderGoneError(str(exc)) from exc
            if turn == _END:
                return
            if turn == _SAMPLE:
                self._sampling.run_for(number)
                self._ranks.execution.gather_bytes(b"".join(_framed(self._outbox)))
                self._outbox.clear()
                continue
            prepared = self._inbox.take_from(in_turn=turn == _OPERATION)
            self._execute(prepared, number)

    def _tell(self, turn: str, number: float = 0) -> None:
        self._ranks.turns.tell([turn, number])

    def _execute(self, prepared: Prepared, rank: float) -> WorkerEvent | None:
        self._sampling.takes_next = self._ranks.rank == rank
        return self._commands.execute(prepared)

    def _place(self, prepared: Prepared) -> int:
        """The rank with the fewest requests, which shall have this one too; the leader where that has them all."""
        if self._sampling.one_schedule:
            return 0
        loads = Counter(self._elsewhere.values())
        loads[0] = self._sampling.generation.num_requests
        rank = min(range(self._ranks.world_size), key=lambda rank: loads[rank])
        if rank:
            self._elsewhere[prepared.command_id] = rank
        return rank

    def _sample(self, seconds: float, send: Callable[[WorkerEvent], object]) -> None:
        """A slice of sampling on every rank."""
        self._tell(_SAMPLE, seconds)
        self._sampling.run_for(seconds)
        for rank, message in enumerate(self._ranks.execution.gather_bytes(b"")):
            for event in _unframed(message):
                self._commands.note_counters(rank, dict(event.counters))
                event.ClearField("counters")
                if event.WhichOneof("event") == "done":
                    self._elsewhere.pop(event.command_id, None)
                send(event)


def told_to_all(commands: Iterable[WorkerCommand], ranks: Ranks) -> Iterator[WorkerCommand]:
    """The leader's commands, each told to the other ranks as it comes, and their end."""
    try:
        for command in commands:
            if ranks.world_size > 1:
                ranks.commands.tell_bytes(command.SerializeToString())
            yield command
    finally:
        ranks.commands.tell_bytes(b"")


def told_by_leader(ranks: Ranks) -> Iterator[WorkerCommand]:
    """The same on another rank, until the leader has no more, or is gone."""
    with contextlib.suppress(RuntimeError):
        while message := ranks.commands.tell_bytes():
            yield WorkerCommand.FromString(message)


def _framed(events: Iterable[WorkerEvent]) -> Iterator[bytes]:
    for event in events:
        encoded = event.SerializeToString()
        yield len(encoded).to_bytes(_SIZE_BYTES, "little")
        yield encoded


def _unframed(message: bytes) -> Iterator[Any]:
    place = 0
    while place < len(message):
        size = int.from_bytes(message[place : place + _SIZE_BYTES], "little")
        place += _SIZE_BYTES + size
        yield WorkerEvent.FromString(message[place - size : place])
