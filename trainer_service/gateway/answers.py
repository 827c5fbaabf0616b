"""Answers that wait to be fetched: in memory for a while, bounded; behind that they come from where they are kept."""

from collections import OrderedDict

from trainer_service.gateway.outcomes import Outcome

_MAX_BYTES = 128 * 1024 * 1024


class Answers:
    """The latest answers, by request id."""

    def __init__(self, max_bytes: int = _MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._kept: OrderedDict[str, Outcome] = OrderedDict()

    def keep(self, request_id: str, outcome: Outcome) -> None:
        """Keeps one; the oldest make room."""
        self.forget(request_id)
        self._kept[request_id] = outcome
        self._bytes += len(outcome.body)
        while self._bytes > self._max_bytes and len(self._kept) > 1:
            self.forget(next(iter(self._kept)))

    def get(self, request_id: str) -> Outcome | None:
        """One that is still kept."""
        return self._kept.get(request_id)

    def forget(self, request_id: str) -> None:
        """Lets one go."""
        outcome = self._kept.pop(request_id, None)
        if outcome is not None:
            self._bytes -= len(outcome.body)
