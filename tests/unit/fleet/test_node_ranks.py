"""Which of several machines' ranks is said to have ended a worker. Without ranks."""

import pytest
from gradwire.v1.node_service_pb2 import NodeEnded, NodeEvent, NodeHello

from trainer_service.fleet.node_ranks import NodeRanks
from trainer_service.fleet.nodes import Node

HERE, THERE = "the rank here has ended", "its rank has ended"


class LocalRanks:
    """Ranks of this machine that have all ended."""

    def __init__(self, *, killed: bool) -> None:
        self.killed = killed
        self.all_run = False

    async def explain(self, *, how: str = "") -> str:
        return HERE


@pytest.mark.parametrize(
    ("killed_here", "killed_there", "told"),
    [(False, False, HERE), (False, True, f"On node 1: {THERE}"), (True, True, HERE), (True, False, HERE)],
)
async def test_the_rank_that_a_signal_ended_is_told_though_another_was_heard_of_first(
    killed_here: bool, killed_there: bool, told: str
):
    node = Node(NodeHello(node_rank=1, instance_id="a"), "192.0.2.1:7000")
    share = node.share("the start")
    local = LocalRanks(killed=killed_here)
    ranks = NodeRanks(local, [share], leave_reason=pytest.fail, over=lambda: None)  # pyright: ignore[reportArgumentType]
    node.hear(NodeEvent(ended=NodeEnded(start_id="the start", reason=THERE, killed=killed_there)))
    assert await ranks.explain() == told
