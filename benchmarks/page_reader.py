"""Live pages without a browser: opens event streams of a trainer's page, and reads what they are told.

    python benchmarks/page_reader.py HOST:PORT PATH COUNT

Prints "open" once every page has the trainer's full state, and ends when its stdin does. It looks at nothing that comes
after, so that it takes as little of the machine as anything can that reads.
"""

import select
import socket
import sys


def main(address: str, path: str, count: int) -> None:
    """Reads until stdin ends."""
    host, _, port = address.rpartition(":")
    request = f"GET {path} HTTP/1.1\r\nHost: {address}\r\nAccept: text/event-stream\r\n\r\n".encode()
    pages: dict[int, socket.socket] = {}
    for _ in range(count):
        page = socket.create_connection((host, int(port)), timeout=60)
        page.sendall(request)
        pages[page.fileno()] = page
    for page in pages.values():
        got = b""
        while b"event: state" not in got:
            piece = page.recv(1 << 16)
            if not piece:
                sys.exit(f"A page was not opened: {got[:200]!r}")
            got += piece
    print("open", flush=True)

    waiting = select.epoll()
    waiting.register(sys.stdin.fileno(), select.EPOLLIN | select.EPOLLHUP)
    for descriptor in pages:
        waiting.register(descriptor, select.EPOLLIN)
    space = bytearray(1 << 20)
    while True:
        for descriptor, _ in waiting.poll():
            if descriptor == sys.stdin.fileno():
                return
            if not pages[descriptor].recv_into(space):
                sys.exit("A page was closed.")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
