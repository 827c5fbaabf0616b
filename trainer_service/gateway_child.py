"""The gateway that `gradwire serve --gateway` runs beside a trainer: a child process, restarted if it ends."""

import asyncio
import contextlib
import logging
import sys
from collections.abc import AsyncGenerator

from trainer_service.command_lines import SettingsError, command_line
from trainer_service.config import GatewayConfig
from trainer_service.processes import start_child, stop_child

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 60.0
_PAUSE_S = 1.0
_GRACE_S = 10.0


@contextlib.asynccontextmanager
async def gateway_child(config: GatewayConfig) -> AsyncGenerator[None]:
    """Runs a gateway while the block lasts; it listens when the block begins.

    Args:
        config: Its settings, with a ready_file. Keys of the environment are inherited.

    Raises:
        SettingsError: It did not start; its own message is on stderr.
    """
    ready_file = config.ready_file
    assert ready_file is not None
    command = [sys.executable, "-m", "trainer_service", "gateway", *command_line(config)]
    ready_file.unlink(missing_ok=True)
    # Its log goes where ours does.
    process = await start_child(*command)

    async def keep_up() -> None:
        nonlocal process
        while True:
            code = await process.wait()
            logger.error("The gateway ended; it is started again.", extra={"fields": {"code": code}})
            await asyncio.sleep(_PAUSE_S)
            process = await start_child(*command)

    keeper: asyncio.Task[None] | None = None
    try:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_START_TIMEOUT_S):
                # Another process writes it, so there is no event to wait for.
                while not ready_file.exists() and process.returncode is None:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
        if not ready_file.exists():
            raise SettingsError(f"--gateway {config.listen}: the gateway did not start; its message is above.")
        keeper = asyncio.create_task(keep_up())
        yield
    finally:
        if keeper is not None:
            keeper.cancel()
            await asyncio.gather(keeper, return_exceptions=True)
        await stop_child(process, grace_s=_GRACE_S)
