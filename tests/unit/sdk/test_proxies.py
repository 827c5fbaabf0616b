"""Which connections go through the environment's HTTP proxy, and what their errors say of it."""

import socket
import threading
from collections.abc import Iterator

import pytest
from gradwire import ServiceClient, TrainerJobManager
from gradwire._client.proxies import proxy_used
from gradwire._client.transport import Connection
from gradwire._wire.channels import reaches_this_machine
from gradwire.errors import UnavailableError
from gradwire.v1.trainer_service_pb2 import GetServerInfoRequest
from gradwire.v1.trainer_service_pb2_grpc import TrainerServiceStub

from tests.front_end import front_end_on_a_thread


@pytest.fixture(autouse=True)
def no_proxy_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """A proxy that refuses everything; what it was asked."""
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    asked.append(connection.recv(4096))
                    connection.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        monkeypatch.setenv("http_proxy", f"http://user:secret@127.0.0.1:{server.getsockname()[1]}")
        yield asked
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("target", "here"),
    [
        ("127.0.0.1:1", True),
        ("127.8.8.8:1", True),
        ("[::1]:1", True),
        ("[::ffff:127.0.0.1]:1", True),
        ("0.0.0.0:1", True),
        ("localhost:1", True),
        ("LOCALHOST:1", True),
        ("localhost.:1", True),
        ("trainer.localhost:1", True),
        ("unix:/run/trainer.sock", True),
        ("10.0.0.1:1", False),
        ("trainer:1", False),
        ("notlocalhost:1", False),
        ("localhost.example.org:1", False),
    ],
)
def test_this_machine_is_told_from_others(target: str, here: bool):
    assert reaches_this_machine(target) is here


def test_a_trainer_and_a_control_plane_here_are_reached_beside_the_proxy(proxy: list[bytes]):
    with front_end_on_a_thread() as trainer:
        port = trainer.address.rpartition(":")[2]
        for host in ("127.0.0.1", "localhost"):
            with ServiceClient(f"http://{host}:{port}", timeout_s=30) as service:
                assert service.get_server_info().ready
        url = f"http://{trainer.address}"
        with TrainerJobManager(base_url=url) as manager, pytest.raises(NotImplementedError, match="does not offer"):
            manager.list()
    assert proxy == []


def test_a_connection_that_the_proxy_refuses_names_it_and_the_way_past_it(proxy: list[bytes]):
    connection = Connection("http://trainer.invalid:7777")
    with pytest.raises(UnavailableError) as caught:
        connection.call(TrainerServiceStub, "GetServerInfo", GetServerInfoRequest(), timeout_s=30)
    connection.close()
    said = str(caught.value)
    assert "the proxy refuses to connect there" in said
    assert "the environment variable http_proxy names" in said
    assert "no_proxy=trainer.invalid" in said
    assert "secret" not in said
    assert len(proxy) == 1, "what the proxy refuses was tried again"
    assert proxy[0].startswith(b"CONNECT trainer.invalid:7777 ")


@pytest.mark.parametrize(
    ("no_proxy", "told"),
    [("", True), ("other", True), ("gpu.example.org", False), (".example.org", False), ("x, example.org", False)],
)
def test_what_no_proxy_takes_out_has_none_in_its_error(monkeypatch: pytest.MonkeyPatch, no_proxy: str, told: bool):
    monkeypatch.setenv("https_proxy", "proxy.example.org:3128")
    monkeypatch.setenv("no_proxy", no_proxy)
    assert ("proxy.example.org:3128" in proxy_used("gpu.example.org:7777")) is told
    assert proxy_used("127.0.0.1:7777") == ""


def test_a_network_in_no_proxy_takes_its_addresses_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("grpc_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "10.0.0.0/8")
    assert proxy_used("10.1.2.3:7777") == ""
    assert "grpc_proxy" in proxy_used("11.1.2.3:7777")
