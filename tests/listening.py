"""What processes listen on, from /proc."""

import os
import socket
import struct
from collections.abc import Iterable
from pathlib import Path

_TCP_LISTEN, _UDP_UNCONNECTED = "0A", "07"


def listening(pids: Iterable[int]) -> set[str]:
    """host:port of every TCP and UDP socket on which anybody may send something to one of these processes.

    Addresses of IPv4 that are spelt in IPv6 are told as IPv4.
    """
    sockets: dict[int, str] = {}
    for protocol, state in (("tcp", _TCP_LISTEN), ("tcp6", _TCP_LISTEN), ("udp", _UDP_UNCONNECTED), ("udp6", "07")):
        for line in Path(f"/proc/net/{protocol}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == state:
                sockets[int(fields[9])] = _address(fields[1])
    found: set[str] = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(descriptor)
            except FileNotFoundError:
                continue  # Closed meanwhile.
            if target.startswith("socket:[") and (inode := int(target[8:-1])) in sockets:
                found.add(sockets[inode])
    return found


def _address(text: str) -> str:
    """ "127.0.0.1:7777" of the kernel's "0100007F:1E61": words of 32 bits in the machine's order."""
    host, _, port = text.partition(":")
    packed = b"".join(struct.pack("=I", int(host[start : start + 8], 16)) for start in range(0, len(host), 8))
    if len(packed) == 4:
        return f"{socket.inet_ntop(socket.AF_INET, packed)}:{int(port, 16)}"
    name = socket.inet_ntop(socket.AF_INET6, packed)
    return f"{name.removeprefix('::ffff:')}:{int(port, 16)}"


def free_port() -> int:
    """A port of loopback that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as held:
        return held.getsockname()[1]
