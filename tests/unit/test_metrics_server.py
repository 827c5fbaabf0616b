"""The metrics port: scraped by anybody, held by nobody."""

import contextlib
import socket
import threading
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Gauge

from trainer_service import metrics_server
from trainer_service.metrics_server import serve_metrics


@pytest.fixture
def address() -> Iterator[str]:
    registry = CollectorRegistry()
    Gauge("answer", "The answer.", registry=registry).set(42)
    address, stop = serve_metrics("127.0.0.1:0", registry)
    yield address
    stop()


def scrape(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as response:
        return response.read().decode()


def connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=30)


def test_idle_connections_take_a_bounded_number_of_threads_and_a_scrape_gets_through(address: str):
    before = threading.active_count()
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connect(address)) for _ in range(100)]
        for connection in idle[::2]:
            # Half of them begin a request and go no further.
            with contextlib.suppress(OSError):
                connection.sendall(b"GET /metrics HTT")
        assert "answer 42.0" in scrape(address)
        # 16 are served, and some may be at their end.
        assert threading.active_count() - before < 50
        # The oldest made room: they are at their end.
        assert idle[1].recv(1) == b""
        assert "answer 42.0" in scrape(address)


def test_a_connection_that_says_nothing_is_closed_after_a_while(address: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(metrics_server._Handler, "timeout", 0.2)
    with connect(address) as connection:
        assert connection.recv(1) == b""


@pytest.mark.parametrize("listen", ["[::1]:0", "127.0.0.1:0"])
def test_it_listens_where_it_is_told_and_no_longer_once_stopped(listen: str):
    if listen.startswith("[") and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    address, stop = serve_metrics(listen, CollectorRegistry())
    assert address.startswith(listen.removesuffix("0"))
    scrape(address)
    with pytest.raises(OSError, match=f"cannot serve metrics on {address.replace('[', '.').replace(']', '.')}"):
        serve_metrics(address, CollectorRegistry())
    stop()
    with pytest.raises(ConnectionRefusedError):
        connect(address.replace("[", "").replace("]", ""))
