"""How the gateway listens."""

import socket

from trainer_service.gateway.process import listen_on


def test_a_connection_is_of_a_protocol_that_asyncio_sends_on_without_delay():
    """Else each answer waits 40 ms between its head and its body."""
    with listen_on("127.0.0.1", 0) as sock, socket.create_connection(sock.getsockname()):
        accepted, _ = sock.accept()
        with accepted:
            assert accepted.proto == socket.IPPROTO_TCP
