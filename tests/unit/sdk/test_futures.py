"""One future for threads and coroutines."""

import asyncio
import threading
from concurrent.futures import Future as ConcurrentFuture

import pytest
from gradwire.errors import OperationCancelledError, OperationTimeoutError, error
from gradwire.futures import APIFuture


def make() -> tuple[ConcurrentFuture[int], APIFuture[int]]:
    inner: ConcurrentFuture[int] = ConcurrentFuture()
    inner.set_running_or_notify_cancel()
    return inner, APIFuture(inner, "forward")


def test_result_waits_for_another_thread():
    inner, future = make()
    threading.Timer(0.05, inner.set_result, [7]).start()
    assert future.result(timeout=5) == 7
    assert future.done()


def test_result_times_out_with_a_sentence_and_can_be_waited_for_again():
    inner, future = make()
    with pytest.raises(OperationTimeoutError, match="forward was not answered within 0.01 s") as caught:
        future.result(timeout=0.01)
    assert isinstance(caught.value, TimeoutError)
    inner.set_result(7)
    assert future.result() == 7


def test_the_future_is_awaitable_on_any_loop_and_twice():
    inner, future = make()
    threading.Timer(0.05, inner.set_result, [7]).start()

    async def wait() -> int:
        return await future

    assert asyncio.run(wait()) == 7
    assert asyncio.run(wait()) == 7


def test_waiting_with_a_timeout_on_a_loop_does_not_cancel_the_operation():
    inner, future = make()

    async def wait() -> int:
        with pytest.raises(OperationTimeoutError):
            await future.result_async(timeout=0.01)
        task = asyncio.ensure_future(future.result_async())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        inner.set_result(7)
        return await future

    assert asyncio.run(wait()) == 7


def test_a_call_that_is_given_up_with_its_waiter_ends_with_the_last_of_them_and_with_no_timeout():
    inner: ConcurrentFuture[int] = ConcurrentFuture()
    future = APIFuture(inner, "sample", given_up_with_waiter=True)

    async def wait() -> None:
        with pytest.raises(OperationTimeoutError):
            await future.result_async(timeout=0.01)
        first, last = (asyncio.ensure_future(future.result_async()) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert not inner.cancelled()
        last.cancel()
        with pytest.raises(asyncio.CancelledError):
            await last
        assert inner.cancelled()
        with pytest.raises(OperationCancelledError, match="sample was given up"):
            await future

    asyncio.run(wait())


def test_an_error_reaches_both_kinds_of_waiting():
    inner, future = make()
    inner.set_exception(error("NO_GRADIENTS", "Nothing accumulated."))
    with pytest.raises(RuntimeError, match="Nothing accumulated"):
        future.result()

    async def wait() -> None:
        await future

    with pytest.raises(RuntimeError, match="Nothing accumulated"):
        asyncio.run(wait())
    assert "Nothing" in str(future.exception())


def test_a_timeout_error_of_the_operation_itself_is_not_taken_for_ours():
    inner, future = make()
    inner.set_exception(TimeoutError("the user's own"))
    with pytest.raises(TimeoutError, match="the user's own"):
        future.result(timeout=5)


def test_callbacks_get_the_future():
    inner, future = make()
    seen: list[int] = []
    future.add_done_callback(lambda f: seen.append(f.result()))
    inner.set_result(7)
    assert seen == [7]
