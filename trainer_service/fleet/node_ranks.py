"""One worker's ranks on all machines, as one."""

import asyncio
import errno
import secrets
from collections.abc import Callable, Mapping, Sequence

from gradwire.errors import GradwireError
from gradwire.v1.node_service_pb2 import NodeStart, NodeStop

from trainer_service.fleet.nodes import Nodes, Share, because_of
from trainer_service.fleet.rank_processes import Place, RankProcesses

_ELSEWHERE_S = 1.0
"""How long to wait, when ranks here have ended, to hear of those that ended before them elsewhere."""
_STOP_MARGIN_S = 10.0
"""How long a node may take, beyond the grace period, to say that its ranks have ended. Later its connection is cut."""


class NodeRanks:
    """Ranks that run on all nodes. Made by `start`.

    Args:
        local: Those of this machine.
        shares: Those of the others.
        leave_reason: Keeps what a rank elsewhere left for the operation under way.
        over: Called once they are all ended.
    """

    def __init__(
        self,
        local: RankProcesses,
        shares: Sequence[Share],
        *,
        leave_reason: Callable[[GradwireError], object],
        over: Callable[[], object],
    ) -> None:
        self._local = local
        self._shares = shares
        self._leave_reason = leave_reason
        self._over = over
        self._first: Share | None = None  # Whose ranks ended before any here.

    @classmethod
    async def start(
        cls,
        nodes: Nodes,
        command: Sequence[str],
        *,
        options: Sequence[str],
        env: Mapping[str, str],
        folder: str,
        spare: bool,
        leave_reason: Callable[[GradwireError], object],
    ) -> "NodeRanks":
        """Starts every rank of every node.

        Args:
            nodes: The other machines.
            command: The command line of a rank of this machine.
            options: The worker's options, for the others.
            env: What ranks of this machine share of their environment.
            folder: The private folder of this machine's ranks.
            spare: Whether they wait until they are told to begin.
            leave_reason: Keeps what a rank elsewhere left for the operation under way.

        Raises:
            OSError: A node is missing, or a rank could not be started; the others were ended again.
        """
        if nodes.missing:
            raise OSError(errno.EAGAIN, f"node {nodes.missing[0]} has gone")
        start_id = secrets.token_urlsafe(16)
        nodes.stores.open(start_id)
        size, nnodes = nodes.policy.local_world_size, nodes.settings.nnodes
        shares = [node.share(start_id) for node in nodes.joined.values()]
        start = NodeStart(start_id=start_id, local_world_size=size, nnodes=nnodes, options=options, spare=spare)
        for share in shares:
            share.node.tell(start=start)
        place = Place(size, nnodes=nnodes, interface=nodes.interface, start_id=start_id)
        try:
            local = await RankProcesses.start(command, env=env, folder=folder, place=place)
        except BaseException:
            await asyncio.gather(*(_stop(share, grace_s=0) for share in shares))
            nodes.stores.close(start_id)
            raise
        return cls(local, shares, leave_reason=leave_reason, over=lambda: nodes.stores.close(start_id))

    @property
    def all_run(self) -> bool:
        return self._local.all_run and not any(share.ended.done() for share in self._shares)

    def begin(self) -> None:
        for share in self._shares:
            share.node.tell(begin=share.start_id)
        self._local.begin()

    async def one_ended(self) -> None:
        local = asyncio.create_task(self._local.one_ended())
        try:
            await asyncio.wait([local, *self._ends], return_when=asyncio.FIRST_COMPLETED)
            if not local.done():
                self._first = next(share for share in self._shares if share.ended.done())
        finally:
            local.cancel()

    async def explain(self, *, how: str = "lost its connection") -> str:
        if not self._local.all_run:
            # Ranks end one after another when one of them does, and news from elsewhere take longer.
            await asyncio.wait(self._ends, timeout=_ELSEWHERE_S)
        ended = [share for share in self._shares if share.ended.done()]
        for share in ended:
            if (failure := because_of(share.ended.result())) is not None:
                self._leave_reason(failure)
                return _told(share)
        # News of the rank that a signal has ended may come after news of those that ended for want of it.
        if not self._local.killed:
            self._first = next((share for share in ended if share.ended.result().killed), self._first)
        return await self._local.explain(how=how) if self._first is None else _told(self._first)

    async def stop(self, *, grace_s: float) -> None:
        await asyncio.gather(
            self._local.stop(grace_s=grace_s), *(_stop(share, grace_s=grace_s) for share in self._shares)
        )
        self._over()

    @property
    def _ends(self) -> "list[asyncio.Future[object]]":
        return [share.ended for share in self._shares]  # pyright: ignore[reportReturnType]


def _told(share: Share) -> str:
    return f"On node {share.node.rank}: {share.ended.result().reason}"


async def _stop(share: Share, *, grace_s: float) -> None:
    if share.ended.done():
        return
    share.node.tell(stop=NodeStop(start_id=share.start_id, grace_ms=round(grace_s * 1000)))
    await asyncio.wait([share.ended], timeout=grace_s + _STOP_MARGIN_S)
    if not share.ended.done():
        # It comes back once it listens again, and ends its ranks meanwhile.
        share.node.outgoing.put_nowait(None)
