"""What a trainer shows to whoever can reach its machine, and what it withstands from there.

One trainer that may open 256 files. After every attack another key's run, bystander's, goes on with the same numbers.
"""

import contextlib
import os
import shutil
import signal
import socket
import struct
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from gradwire import ServiceClient

from tests.bystander import Bystander
from tests.listening import listening
from tests.trainer_process import TrainerProcess, descendants, running_trainer, wait_gone

MAX_OPEN_FILES = 256


@pytest.fixture(scope="module")
def trainer(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrainerProcess]:
    """A ready trainer process."""
    folder = tmp_path_factory.mktemp("exposure")
    options = ("--worker-heartbeat-timeout-s", "5")
    with running_trainer(tiny_llama, folder, *options, max_open_files=MAX_OPEN_FILES) as running:
        running.wait_ready()
        yield running


def processes(trainer: TrainerProcess) -> list[int]:
    return [trainer.process.pid, *descendants(trainer.process.pid)]


def connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=30)


def wait_for_another_worker(trainer: TrainerProcess, pid: int) -> None:
    """Returns once the worker `pid` is gone and the next one is ready."""
    assert wait_gone([pid], timeout_s=60) == []
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(AssertionError):
            if trainer.worker_pid() != pid:
                break
        assert time.monotonic() < deadline, trainer.log.read_text()
        time.sleep(0.05)
    trainer.wait_ready()


def test_nothing_listens_but_what_was_asked_for(trainer: TrainerProcess):
    assert len(processes(trainer)) == 2, "trainer, worker"
    assert listening(processes(trainer)) == {trainer.address, trainer.metrics_address}


def answers_as_a_store(address: str, *, timeout_s: float) -> bool:
    """Whether a client of torch.distributed's TCPStore finds one there: it says its magic number and pings."""
    with connect(address) as client:
        client.settimeout(timeout_s)
        client.sendall(b"\x00" + struct.pack("=I", 0x3C85F7CE) + b"\x0d" + struct.pack("=I", 1234))
        try:
            return client.recv(4) == struct.pack("=I", 1234)
        except OSError:
            return False


def test_nothing_answers_a_client_of_a_rendezvous_store(trainer: TrainerProcess):
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert answers_as_a_store(f"127.0.0.1:{store.port}", timeout_s=30)
    with Bystander(trainer.base_url):
        for address in listening(processes(trainer)):
            assert not answers_as_a_store(address, timeout_s=1)


def test_idle_connections_take_no_descriptor_that_others_need(trainer: TrainerProcess):
    """More of them than the trainer may open files, the worker killed meanwhile, and a run made meanwhile."""
    with contextlib.ExitStack() as stack:
        connected = stack.enter_context(ServiceClient(trainer.base_url))
        # It trains on to the end before the others leave.
        with Bystander(trainer.base_url):
            connected.get_server_info()
            idle = [stack.enter_context(connect(trainer.address)) for _ in range(2 * MAX_OPEN_FILES)]
            # The last one too many is closed at once, so the others have been let in.
            assert idle[-1].recv(1) == b""
            pid = trainer.worker_pid()
            os.kill(pid, signal.SIGKILL)
            client = connected.create_training_client()
            client.zero_grad().result(90)
            assert trainer.worker_pid() != pid
        assert len(list(Path(f"/proc/{trainer.process.pid}/fd").iterdir())) > MAX_OPEN_FILES // 3
        client.delete_run()
    log = trainer.log.read_text()
    assert "STORAGE_FAILED" not in log
    assert "Too many open files" not in log
    # The places are free again.
    with ServiceClient(trainer.base_url) as service:
        service.get_server_info()


def test_idle_connections_to_the_metrics_cost_few_threads(trainer: TrainerProcess):
    def threads() -> int:
        return len(list(Path(f"/proc/{trainer.process.pid}/task").iterdir()))

    with Bystander(trainer.base_url), contextlib.ExitStack() as stack:
        before = threads()
        for _ in range(200):
            stack.enter_context(connect(trainer.metrics_address))
        with urllib.request.urlopen(f"http://{trainer.metrics_address}/metrics", timeout=30) as response:
            assert b"gradwire_worker_up 1.0" in response.read()
        assert threads() - before < 50


def test_a_stopped_worker_is_replaced_though_its_sockets_folder_is_gone(trainer: TrainerProcess):
    with Bystander(trainer.base_url):
        pid = trainer.worker_pid()
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        [socket] = [os.fsdecode(part.partition(b"=")[2]) for part in command if part.startswith(b"--socket=")]
        worker_folder = Path(socket).parent
        assert worker_folder.name.startswith("gradwire-worker-")
        shutil.rmtree(worker_folder)
        os.kill(pid, signal.SIGSTOP)
        wait_for_another_worker(trainer, pid)
        assert listening(processes(trainer)) == {trainer.address, trainer.metrics_address}
