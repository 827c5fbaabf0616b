"""The worker's inbox: operations in order, sampling ahead of them."""

import queue
import threading
from collections.abc import Iterator

from trainer_service.engine.worker.inbox import Inbox


def running(inbox: Inbox[str, str], commands: Iterator[str]) -> list[threading.Thread]:
    threads = [
        threading.Thread(target=inbox.read, args=(commands,), daemon=True),
        threading.Thread(target=inbox.prepare_overtaking, daemon=True),
        threading.Thread(target=inbox.prepare_operations, daemon=True),
    ]
    for thread in threads:
        thread.start()
    return threads


def test_operations_come_in_order_and_what_overtakes_comes_first():
    source: queue.SimpleQueue[str] = queue.SimpleQueue()
    decoded: list[str] = []

    def prepare(command: str) -> str:
        decoded.append(command)
        return command.upper()

    inbox: Inbox[str, str] = Inbox(prepare, lambda command: command.startswith("s"))
    assert inbox.take(wait=False) == (None, False)
    for number in range(20):
        source.put(f"op{number}")
    source.put("sample")
    source.put("")
    threads = running(inbox, iter(source.get, ""))
    for thread in threads[:2]:
        thread.join(10)
    assert inbox.take(wait=True) == ("SAMPLE", False)
    # Preparing keeps only a few ahead of those taken.
    assert len([command for command in decoded if command != "sample"]) <= 9 or not threads[2].is_alive()
    assert [inbox.take(wait=True) for _ in range(20)] == [(f"OP{number}", True) for number in range(20)]
    threads[2].join(10)
    assert inbox.take(wait=True) == (None, False)
    assert inbox.ended


def test_what_takes_long_to_prepare_keeps_nobody_else_waiting():
    source: queue.SimpleQueue[str] = queue.SimpleQueue()
    held = {"slow op": threading.Event(), "sample slowly": threading.Event()}

    def prepare(command: str) -> str:
        if command in held:
            assert held[command].wait(10)
        return command

    inbox: Inbox[str, str] = Inbox(prepare, lambda command: command.startswith("sample"))
    threads = running(inbox, iter(source.get, ""))
    source.put("sample slowly")
    source.put("op")
    assert inbox.take(wait=True) == ("op", True)
    held["sample slowly"].set()
    assert inbox.take(wait=True) == ("sample slowly", False)
    source.put("slow op")
    source.put("sample")
    assert inbox.take(wait=True) == ("sample", False)
    held["slow op"].set()
    assert inbox.take(wait=True) == ("slow op", True)
    source.put("")
    for thread in threads:
        thread.join(10)
    assert inbox.ended


def test_a_waiting_worker_wakes_for_either_kind():
    source: queue.SimpleQueue[str] = queue.SimpleQueue()
    inbox: Inbox[str, str] = Inbox(str.upper, lambda command: command.startswith("s"))
    threads = running(inbox, iter(source.get, ""))
    for command in ("sample", "op", "sample", "op"):
        source.put(command)
        assert inbox.take(wait=True) == (command.upper(), command == "op")
    assert not inbox.ended
    source.put("")
    for thread in threads:
        thread.join(10)
    assert inbox.ended


def test_what_overtakes_is_prepared_while_an_operation_is_left_to_the_executing_thread():
    source: queue.SimpleQueue[str] = queue.SimpleQueue()
    prepared = threading.Event()

    def prepare(command: str) -> str:
        if command == "sample":
            prepared.set()
        return command.upper()

    inbox: Inbox[str, str] = Inbox(prepare, lambda command: command == "sample", quick=lambda _: True)
    # The executing thread waits for whatever comes, and has not woken yet when both have come.
    inbox._idle = True
    running(inbox, iter(source.get, ""))
    source.put("op")
    source.put("sample")
    assert prepared.wait(10)
    assert inbox.take(wait=True) == ("SAMPLE", False)
    assert inbox.take(wait=True) == ("OP", True)
