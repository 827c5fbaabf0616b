"""The one future type: for threads and for coroutines alike."""

import asyncio
from collections.abc import Callable, Generator
from concurrent.futures import CancelledError
from concurrent.futures import Future as ConcurrentFuture
from concurrent.futures import TimeoutError as ConcurrentTimeoutError
from typing import Any, Generic, TypeVar

from gradwire._client.loop import LOOP
from gradwire.errors import OperationCancelledError, OperationTimeoutError

T = TypeVar("T")


class APIFuture(Generic[T]):
    """The answer to a call, when it comes.

    `.result()` blocks, from any thread; `await` works on any event loop. The call is on its way whether or not anybody
    waits, and whether or not its client is still there; an unused future costs nothing. It always resolves: a
    lost connection ends in UnavailableError once reconnecting is given up. In a forked child, a future that the
    parent is waiting for raises FailedPreconditionError.

    Args:
        future: Gets the answer.
        what: Names the call in errors.
        given_up_with_waiter: Whether the call ends when the coroutine that waits for it is cancelled, as asyncio's own
            do: so for samples, which then free their place on the trainer. An operation in its run's order goes on.
    """

    def __init__(self, future: "ConcurrentFuture[T]", what: str, *, given_up_with_waiter: bool = False) -> None:
        self._future = future
        self._what = what
        self._given_up_with_waiter = given_up_with_waiter
        self._waiting = 0  # Coroutines; another one may still want the answer.

    def result(self, timeout: float | None = None) -> T:
        """Waits for the answer.

        Args:
            timeout: Seconds; None waits until the call is answered or given up. A timeout does not stop the call.

        Raises:
            OperationTimeoutError: Nothing within `timeout`.
            GradwireError: What the call failed with.
        """
        self._refuse_in_fork()
        try:
            return self._future.result(timeout)
        except CancelledError:
            raise self._cancelled() from None
        except ConcurrentTimeoutError:
            if self._future.done():
                raise
            raise self._timed_out(timeout) from None

    async def result_async(self, timeout: float | None = None) -> T:
        """As `result`, for coroutines."""
        self._refuse_in_fork()
        self._waiting += 1
        try:
            # Shielded: a caller that stops waiting must not cancel an operation already in the run's order.
            return await asyncio.wait_for(asyncio.shield(asyncio.wrap_future(self._future)), timeout)
        except TimeoutError:
            if self._future.done():
                raise
            raise self._timed_out(timeout) from None
        except asyncio.CancelledError:
            if self._future.cancelled():
                raise self._cancelled() from None
            if self._given_up_with_waiter and self._waiting == 1:
                self._future.cancel()
            raise
        finally:
            self._waiting -= 1

    def __await__(self) -> Generator[Any, None, T]:
        return self.result_async().__await__()

    async def coroutine(self) -> T:
        """As `result`, for what takes a coroutine, such as asyncio.create_task."""
        return await self

    def future(self) -> "ConcurrentFuture[T]":
        """The concurrent.futures.Future beneath."""
        return self._future

    def cancel(self) -> bool:
        """Gives the call up where that can be done: a sample can, an operation in its run's order cannot.

        Returns:
            Whether it was given up; `result` then raises OperationCancelledError.
        """
        return self._future.cancel()

    def done(self) -> bool:
        """Whether the answer is there."""
        return self._future.done()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What the call failed with, or None; waits as `result` does."""
        try:
            self.result(timeout)
        except BaseException as exc:
            if not self._future.done():
                raise
            return exc
        return None

    def add_done_callback(self, callback: "Callable[[APIFuture[T]], object]") -> None:
        """Calls `callback(self)` once answered, on Gradwire's event loop thread: it must not block."""
        self._future.add_done_callback(lambda _: callback(self))

    def __reduce__(self) -> Any:
        raise TypeError(
            f"The future of {self._what} cannot be pickled or copied: its answer arrives in the process that made the "
            "call. Hand on what .result() returns."
        )

    def _refuse_in_fork(self) -> None:
        if not self._future.done():
            # The answer arrives in the parent.
            LOOP.refuse_if_lost()

    def _timed_out(self, timeout: float | None) -> OperationTimeoutError:
        return OperationTimeoutError(
            f"{self._what} was not answered within {timeout:g} s. It is still under way: wait again with .result()."
        )

    def _cancelled(self) -> OperationCancelledError:
        return OperationCancelledError(f"{self._what} was given up before it was answered.", reason="CANCELLED")

    def __repr__(self) -> str:
        state = "pending" if not self.done() else "failed" if self._future.exception() else "done"
        return f"<APIFuture {self._what}: {state}>"
