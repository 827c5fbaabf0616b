"""A client's hold on a run."""

import asyncio

from gradwire.errors import GradwireError


class Attachment:
    """A client's hold on a run, until it leaves or loses it."""

    def __init__(self, client_id: str) -> None:
        self.client_id = client_id
        self.taken: asyncio.Future[GradwireError] = asyncio.get_running_loop().create_future()
        """Resolves with the reason when the client no longer holds the run."""

    def take(self, reason: GradwireError) -> None:
        """Ends the hold."""
        if not self.taken.done():
            self.taken.set_result(reason)
