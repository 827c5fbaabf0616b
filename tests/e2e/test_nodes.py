"""A worker on two machines: two process groups that share a folder, then two network namespaces with a link between."""

import contextlib
import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from gradwire import Mesh, ServiceClient

from tests.chaos import Loop, Place, Trainer, left_behind, state_digests, undisturbed
from tests.listening import listening
from tests.trainer_process import descendants, rank_of, start_trainer, wait_gone
from tests.waiting import wait_until

SEED, STEPS = 2, 6
LORA_RANKS = (0, 4)
Told = list[tuple[dict[Place, str], dict[str, str]]]


class Machine:
    """The second machine: `gradwire worker --join`.

    Args:
        trainer: Where it joins.
        model: Its own copy of the model.
        folder: Gets its log.
        prefix: Of its command line, such as to enter a namespace.
    """

    def __init__(self, join: str, model: Path, folder: Path, *, prefix: Sequence[str] = ()) -> None:
        self.log = folder / "node.log"
        command = ["worker", "--join", join, "--node-rank", "1", "--base-model", str(model)]
        command += ["--join-token-file", str(folder / "token")]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        if not prefix:
            self.process = start_trainer(command, env, self.log, forked=True)
            return
        with self.log.open("wb") as out:
            command = [*prefix, sys.executable, "-m", "trainer_service", *command]
            self.process = subprocess.Popen(command, stdout=out, stderr=out, env=env)

    def ranks(self) -> list[int]:
        """Process ids of its ranks."""
        return [pid for pid in descendants(self.process.pid) if rank_of(pid) is not None]

    def stop(self) -> None:
        """SIGTERM; it must exit 0 and leave no process behind."""
        below = descendants(self.process.pid)
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(30) == 0, self.log.read_text()
        assert wait_gone(below) == []


@pytest.fixture(scope="module")
def wanted(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Told:
    """What two ranks of one machine answer, and have at the end."""
    with Trainer(tiny_llama, tmp_path_factory.mktemp("one_machine"), "--nproc-per-node", "2", forked=True) as trainer:
        return [undisturbed(trainer, seed=SEED, steps=STEPS, lora_rank=rank) for rank in LORA_RANKS]


@contextlib.contextmanager
def two_machines(
    model: Path, folder: Path, address: str, *, prefix: Sequence[str] = ()
) -> Iterator[tuple[Trainer, Machine]]:
    """A trainer on this machine, and another that has joined it.

    Args:
        model: Each has a copy of its own.
        folder: Gets all their files, of which they share the data folder.
        address: By which the other reaches this one.
        prefix: Of the other's command line.
    """
    with socket.create_server((address, 0)) as probe:
        endpoint = f"{address}:{probe.getsockname()[1]}"
    (folder / "token").write_text("as secret as it has to be\n")
    copy = folder / "elsewhere"
    shutil.copytree(model, copy)
    options = ("--nnodes", "2", "--nproc-per-node", "1", "--rdzv-endpoint", endpoint)
    options += ("--join-token-file", str(folder / "token"), "--snapshot-steps", "2", "--spare-worker-after-s", "0")
    with Trainer(model, folder, *options, forked=True) as trainer:
        machine = Machine(endpoint, copy, folder, prefix=prefix)
        try:
            yield trainer, machine
        finally:
            machine.process.kill()
            machine.process.wait()


def disturbed(trainer: Trainer, fault: Callable[[], object]) -> Told:
    """What loops answer, and have at the end, with something that happens between their answers."""
    with (
        ServiceClient(f"http://{trainer.address}", reconnect_timeout_s=120) as service,
        ThreadPoolExecutor() as threads,
    ):
        clients = [service.create_training_client(lora_rank=rank) for rank in LORA_RANKS]
        loops = [Loop(client, seed=SEED, steps=STEPS) for client in clients]
        running = [threads.submit(loop.run) for loop in loops]
        wait_until(lambda: sum(loop.answered for loop in loops) > 3, trainer.log.read_text)
        fault()
        told = [future.result(300) for future in running]
        digests = [state_digests(trainer.data_dir, client, "final") for client in clients]
        mesh = Mesh(world_size=2, local_world_size=1, nnodes=2, fsdp_size=2)
        assert service.get_server_info().models[0].mesh == mesh
    return list(zip(told, digests, strict=True))


@pytest.mark.timeout(300)
def test_two_machines_compute_what_two_ranks_do_whoever_of_them_dies(wanted: Told, tiny_llama: Path, tmp_path: Path):
    with two_machines(tiny_llama, tmp_path, "127.0.0.1") as (trainer, machine):

        def kill() -> None:
            """The rank elsewhere; then the trainer, as the next ranks start."""
            os.kill(machine.ranks()[0], signal.SIGKILL)
            text = "On node 1: The worker process ended (signal SIGKILL)"
            wait_until(lambda: text in trainer.log.read_text(), trainer.log.read_text)
            wait_until(machine.ranks)
            trainer.kill()
            wait_until(lambda: not machine.ranks(), machine.log.read_text)
            trainer.start()

        assert disturbed(trainer, kill) == wanted
        assert machine.process.poll() is None
        trainer.stop()
        assert left_behind(trainer) == []
        machine.stop()
        assert [*Path("/tmp").glob(f"gradwire-worker-{machine.process.pid}-*")] == []


@dataclasses.dataclass(frozen=True)
class Link:
    """A link to a network namespace."""

    namespace: str
    here: str
    """Its interface on this end."""
    address: str
    """This end's."""

    def cut(self) -> None:
        """Nothing gets through any more, in either direction."""
        subprocess.run(["ip", "link", "set", self.here, "down"], check=True)

    def mend(self) -> None:
        """It does again."""
        subprocess.run(["ip", "link", "set", self.here, "up"], check=True)


@pytest.fixture
def link() -> Iterator[Link]:
    name, net = f"gw{os.getpid() % 100_000}", f"10.213.{os.getpid() % 256}"
    made = Link(name, f"{name}a", f"{net}.1")
    inside = ["ip", "-n", name]
    try:
        for command in (
            ["ip", "netns", "add", name],
            ["ip", "link", "add", made.here, "type", "veth", "peer", "name", f"{name}b"],
            ["ip", "link", "set", f"{name}b", "netns", name],
            ["ip", "addr", "add", f"{net}.1/30", "dev", made.here],
            ["ip", "link", "set", made.here, "up"],
            [*inside, "addr", "add", f"{net}.2/30", "dev", f"{name}b"],
            [*inside, "link", "set", f"{name}b", "up"],
            [*inside, "link", "set", "lo", "up"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"No network namespaces here: {' '.join(command)}: {done.stderr.strip()}")
        yield made
    except FileNotFoundError:
        pytest.skip("No network namespaces here: there is no `ip`.")
    finally:
        if shutil.which("ip"):
            for command in (["ip", "link", "del", made.here], ["ip", "netns", "del", name]):
                subprocess.run(command, capture_output=True, check=False)


@pytest.mark.timeout(300)
def test_a_cut_between_two_machines_is_noticed_and_got_over(wanted: Told, tiny_llama: Path, tmp_path: Path, link: Link):
    enter = ("ip", "netns", "exec", link.namespace)
    with two_machines(tiny_llama, tmp_path, link.address, prefix=enter) as (trainer, machine):
        found: set[str] = set()

        def cut() -> None:
            wait_until(lambda: len(trainer.worker_pids()) == 1, trainer.log.read_text)
            found.update(listening(trainer.pids()))
            link.cut()
            wait_until(lambda: "A node is gone" in trainer.log.read_text(), trainer.log.read_text)
            link.mend()

        assert disturbed(trainer, cut) == wanted
        # To clients on loopback; to the other machine on the link; on no other interface.
        assert {address.rpartition(":")[0] for address in found} == {"127.0.0.1", link.address}
        assert "On node 1: the connection from " in trainer.log.read_text()
        trainer.stop()
        machine.stop()
