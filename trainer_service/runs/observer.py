"""Who is told what happens to runs."""

from gradwire.v1.trainer_service_pb2 import TrainResponse

from trainer_service.runs.recovery import Restored
from trainer_service.runs.sequence import Entry


class Observer:
    """Is told what happens to runs, for metrics and traces. This one takes no notice."""

    def answered(self, run_id: str, entry: Entry, response: TrainResponse) -> None:
        """An operation got its answer."""

    def restored(self, run_id: str, found: Restored, waiting: list[Entry]) -> None:
        """A run is back on the worker; `waiting` are operations that go on with it."""
