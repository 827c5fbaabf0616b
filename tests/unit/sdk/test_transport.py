"""Where a base_url leads."""

import socket
import time

import pytest
from gradwire._client.loop import LOOP
from gradwire._client.transport import Connection
from gradwire._wire.channels import parse_base_url
from gradwire.errors import UnavailableError
from gradwire.v1.trainer_service_pb2 import GetServerInfoRequest
from gradwire.v1.trainer_service_pb2_grpc import TrainerServiceStub


@pytest.mark.parametrize(
    ("base_url", "target", "tls"),
    [
        ("http://127.0.0.1:7777", "127.0.0.1:7777", False),
        ("http://127.0.0.1:7777/", "127.0.0.1:7777", False),
        ("127.0.0.1:7777", "127.0.0.1:7777", False),
        ("trainer:7777", "trainer:7777", False),
        ("https://trainer.example.org", "trainer.example.org:443", True),
        ("https://trainer.example.org:8443", "trainer.example.org:8443", True),
        ("http://[::1]:7777", "[::1]:7777", False),
        ("unix:/run/trainer.sock", "unix:/run/trainer.sock", False),
    ],
)
def test_base_url_names_target_and_tls(base_url: str, target: str, tls: bool):
    assert parse_base_url(base_url) == (target, tls)


@pytest.mark.parametrize("base_url", ["http://host", "ftp://host:1", "http://:7777", "http://host:port"])
def test_a_base_url_that_leads_nowhere_is_refused(base_url: str):
    with pytest.raises(ValueError, match="base_url"):
        parse_base_url(base_url)


def test_a_key_with_a_newline_is_refused_before_grpc_chokes_on_it():
    with pytest.raises(ValueError, match="newline"):
        Connection("http://127.0.0.1:1", "secret\n")


def test_nobody_listening_is_unavailable_within_the_timeout_and_names_the_address():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    connection = Connection(f"http://127.0.0.1:{port}")
    start = time.monotonic()
    with pytest.raises(UnavailableError, match=f"no Gradwire server answers at http://127.0.0.1:{port}"):
        connection.call(TrainerServiceStub, "GetServerInfo", GetServerInfoRequest(), timeout_s=1)
    assert time.monotonic() - start < 10
    connection.close()


def test_a_blocking_call_on_the_loop_is_refused_instead_of_hanging():
    async def call() -> None:
        LOOP.run(never())

    async def never() -> None:
        raise AssertionError("must not run")

    with pytest.raises(RuntimeError, match="own event loop"):
        LOOP.run(call(), 5)
