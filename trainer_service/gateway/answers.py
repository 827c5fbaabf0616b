"""Answers that wait to be fetched: in memory for a while, bounded; behind that they come from where they are kept."""

from collections import OrderedDict

from trainer_service.gateway.outcomes import Outcome

_MAX_BYTES = 128 * 1024 * 1024
_ENTRY_BYTES = 512
"""What keeping an answer takes beyond its body: ids, objects, places in tables."""


class Answers:
    """The latest answers, by request id: "<session>:<kind>:<number>:<number>".

    Args:
        max_bytes: What all of them may take.
    """

    def __init__(self, max_bytes: int = _MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._kept: OrderedDict[str, Outcome] = OrderedDict()
        self._of_session: dict[str, set[str]] = {}

    def keep(self, request_id: str, outcome: Outcome) -> None:
        """Keeps an answer; the oldest make room."""
        self.forget(request_id)
        self._kept[request_id] = outcome
        self._of_session.setdefault(_session_of(request_id), set()).add(request_id)
        self._bytes += len(outcome.body) + _ENTRY_BYTES
        while self._bytes > self._max_bytes and len(self._kept) > 1:
            self.forget(next(iter(self._kept)))

    def get(self, request_id: str) -> Outcome | None:
        """The answer, if it is still kept."""
        return self._kept.get(request_id)

    def forget(self, request_id: str) -> None:
        """Forgets an answer."""
        outcome = self._kept.pop(request_id, None)
        if outcome is not None:
            self._bytes -= len(outcome.body) + _ENTRY_BYTES
            session_id = _session_of(request_id)
            of_session = self._of_session[session_id]
            of_session.discard(request_id)
            if not of_session:
                del self._of_session[session_id]

    def forget_session(self, session_id: str) -> None:
        """Lets all of an ended session go."""
        for request_id in list(self._of_session.get(session_id, ())):
            self.forget(request_id)


def _session_of(request_id: str) -> str:
    return request_id.partition(":")[0]
