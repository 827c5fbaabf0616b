"""The rank's end of the store where ranks of several machines meet (fleet/rank_store.py)."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import grpc
from gradwire.v1.node_service_pb2 import (
    AccessRequest,
    AccessResponse,
    StoreEntry,
    StoreExchange,
    StoreKeys,
    StoreSum,
    StoreWait,
)
from gradwire.v1.node_service_pb2_grpc import RankStoreServiceStub
from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

_ANSWER_S = 60.0
"""How long an answer may take that nobody has to wait for."""


class RankStore(Store):
    """torch.distributed's Store over a unix socket. Methods have the names that torch calls them by from C++.

    Args:
        socket: Path of the socket.
        start_id: Of the worker's start that this rank belongs to.
        timeout_s: How long to wait for a key, unless torch says how long.
    """

    def __init__(self, socket: str, start_id: str, *, timeout_s: float) -> None:
        super().__init__()
        self._start_id = start_id
        self._timeout = timedelta(seconds=timeout_s)
        channel = grpc.insecure_channel(f"unix:{socket}", options=[("grpc.enable_http_proxy", 0)])
        self._stub: Any = RankStoreServiceStub(channel)

    def set(self, key: str, value: bytes | str) -> None:
        """Sets a key."""
        self._access(set=StoreEntry(key=key, value=_bytes(value)))

    def get(self, key: str) -> bytes:
        """A key's value, once it is set."""
        return self._wait([key], self._timeout)[0]

    def add(self, key: str, amount: int) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Adds to a key's number, and returns the sum."""
        return self._access(add=StoreSum(key=key, amount=amount)).sum

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Returns once the keys are set."""
        self._wait(keys, timeout or self._timeout)

    def check(self, keys: Sequence[str]) -> bool:
        """Whether the keys are set."""
        return self._access(check=StoreKeys(keys=keys)).found

    def compare_set(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, key: str, expected: bytes | str, desired: bytes | str
    ) -> bytes:
        """Sets a key that has a value, and returns what it has then."""
        exchange = StoreExchange(key=key, expected=_bytes(expected), desired=_bytes(desired))
        return self._access(compare_set=exchange).values[0]

    def deleteKey(self, key: str) -> bool:
        """Deletes a key; whether it was there."""
        return self._access(delete=key).found

    def set_timeout(self, timeout: timedelta) -> None:
        """How long `get` and `wait` wait from now on."""
        self._timeout = timeout

    def _wait(self, keys: Sequence[str], timeout: timedelta) -> Sequence[bytes]:
        timeout_ms = max(1, round(timeout.total_seconds() * 1000))
        wait = StoreWait(keys=keys, timeout_ms=timeout_ms)
        return self._access(wait=wait, answer_s=timeout_ms / 1000 + _ANSWER_S).values

    def _access(self, *, answer_s: float = _ANSWER_S, **access: Any) -> AccessResponse:
        request = AccessRequest(start_id=self._start_id, **access)
        return self._stub.Access(request, timeout=answer_s, wait_for_ready=True)


def _bytes(value: bytes | str) -> bytes:
    return value.encode() if isinstance(value, str) else value
