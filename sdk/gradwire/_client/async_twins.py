"""The `…_async` twins of calls, for coroutines: one line a call, with its signature and docstring.

    forward_async = submitted(forward)

What a twin gives back is what loops written for tinker expect of it.
"""

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, TypeVar

Self = TypeVar("Self")
P = ParamSpec("P")
T = TypeVar("T")


def submitted(call: Callable[Concatenate[Self, P], T]) -> Callable[Concatenate[Self, P], Coroutine[Any, Any, T]]:
    """The twin of a call that only submits: awaiting it makes the call and gives its future, to be awaited as well.

    What is awaited first is first in the run's order.
    """

    async def twin(self: Self, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return getattr(self, call.__name__)(*args, **kwargs)

    return _named(twin, call)


def awaited(
    call: Callable[Concatenate[Self, P], Awaitable[T]],
) -> Callable[Concatenate[Self, P], Coroutine[Any, Any, T]]:
    """The twin of a call that returns a future: awaiting it makes the call and gives its answer."""

    async def twin(self: Self, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await getattr(self, call.__name__)(*args, **kwargs)

    return _named(twin, call)


def off_thread(call: Callable[Concatenate[Self, P], T]) -> Callable[Concatenate[Self, P], Coroutine[Any, Any, T]]:
    """The twin of a call that blocks: it runs on a thread, and the event loop goes on."""

    async def twin(self: Self, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.to_thread(getattr(self, call.__name__), *args, **kwargs)

    return _named(twin, call)


def _named(twin: Callable[..., Any], call: Callable[..., Any]) -> Callable[..., Any]:
    """The twin with the call's signature and docstring, and a name of its own."""
    functools.update_wrapper(twin, call)
    twin.__name__ = f"{call.__name__}_async"
    twin.__qualname__ = f"{call.__qualname__}_async"
    return twin
