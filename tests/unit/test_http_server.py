"""The HTTP server that page and gateway share."""

import asyncio
import socket
import ssl
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.waiting import until
from trainer_service.certificates import make_certificate
from trainer_service.config import ServerTls
from trainer_service.http_server import HttpServer, listening_socket


async def hello(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": scope["scheme"].encode()})


@pytest.fixture
def tls(tmp_path: Path) -> ServerTls:
    files = tmp_path / "tls.crt", tmp_path / "tls.key"
    for file, pem in zip(files, make_certificate(["127.0.0.1"]), strict=True):
        file.write_bytes(pem)
    return ServerTls(*files)


def test_a_connection_is_of_a_protocol_that_asyncio_sends_on_without_delay():
    """Otherwise each answer waits 40 ms between its head and its body."""
    with listening_socket("127.0.0.1:0") as sock, socket.create_connection(sock.getsockname()):
        accepted, _ = sock.accept()
        with accepted:
            assert accepted.proto == socket.IPPROTO_TCP


async def test_it_serves_until_it_is_stopped():
    server = HttpServer("127.0.0.1:0", tls=None)
    assert server.url == f"http://{server.address}/"
    await server.start(hello, stop_grace_s=1)
    async with httpx.AsyncClient(trust_env=False) as http:
        answer = await http.get(server.url)
        assert (answer.text, "server" in answer.headers) == ("http", False)
        await server.stop()
        with pytest.raises(httpx.ConnectError):
            await http.get(server.url)


async def test_it_speaks_tls_with_the_certificate_it_is_given(tls: ServerTls):
    server = HttpServer("127.0.0.1:0", tls=tls)
    await server.start(hello, stop_grace_s=1)
    try:
        trusted = ssl.create_default_context(cafile=str(tls.cert_file))
        async with httpx.AsyncClient(verify=trusted, trust_env=False) as http:
            assert (await http.get(server.url)).text == "https"
        async with httpx.AsyncClient(trust_env=False) as http:
            with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
                await http.get(server.url)
    finally:
        await server.stop()


async def test_it_asks_for_a_client_s_certificate_where_it_has_roots_for_them(tls: ServerTls):
    server = HttpServer("127.0.0.1:0", tls=ServerTls(tls.cert_file, tls.key_file, tls.cert_file))
    await server.start(hello, stop_grace_s=1)
    try:
        trusted = ssl.create_default_context(cafile=str(tls.cert_file))
        async with httpx.AsyncClient(verify=trusted, trust_env=False) as http:
            with pytest.raises(httpx.TransportError):
                await http.get(server.url)
    finally:
        await server.stop()


async def test_an_address_or_a_key_that_cannot_be_used_is_said(tls: ServerTls, tmp_path: Path):
    with listening_socket("127.0.0.1:0") as sock:
        taken = f"127.0.0.1:{sock.getsockname()[1]}"
        with pytest.raises(OSError, match=f"cannot listen on {taken}: Address already in use"):
            HttpServer(taken, tls=None)
    other = tmp_path / "other.key"
    other.write_bytes(make_certificate(["127.0.0.1"])[1])
    server = HttpServer("127.0.0.1:0", tls=ServerTls(tls.cert_file, other))
    with pytest.raises(OSError, match="KEY_VALUES_MISMATCH"):
        await server.start(hello, stop_grace_s=1)
    await server.stop()


async def test_a_head_leaves_in_one_piece_with_its_body_and_alone_where_the_body_lets_wait():
    """Clients read what they are sent: two pieces wake them twice."""
    pieces: list[bytes] = []

    class Reader(asyncio.Protocol):
        def data_received(self, data: bytes) -> None:
            pieces.append(data)

    begun = asyncio.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
        if scope["path"] == "/slow":
            await begun.wait()
        await send({"type": "http.response.body", "body": b"body"})

    server = HttpServer("127.0.0.1:0", tls=None)
    await server.start(slow, stop_grace_s=1)
    host, port = server.address.split(":")
    transport, _ = await asyncio.get_running_loop().create_connection(Reader, host, int(port))
    try:
        transport.write(b"GET /fast HTTP/1.1\r\nhost: x\r\n\r\n")
        await until(lambda: len(pieces) == 1)
        assert pieces[0].endswith(b"\r\n\r\nbody")
        transport.write(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n")
        await until(lambda: len(pieces) == 2)
        assert pieces[1].endswith(b"\r\n\r\n")
        begun.set()
        await until(lambda: len(pieces) == 3)
        assert pieces[2] == b"body"
    finally:
        transport.close()
        await server.stop()
