"""A peer that speaks HTTP/2 by hand, so that it can do what no gRPC library does: begin a message and never end it."""

import select
import socket
import struct
import time
from collections.abc import Iterable
from types import TracebackType

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
# Kinds of frames, their flags, and settings: RFC 9113, sections 6 and 6.5.2.
_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_ACK, _END_STREAM, _END_HEADERS = 1, 1, 4
_MAX_CONCURRENT_STREAMS, _INITIAL_WINDOW_SIZE = 3, 4
_FRAME_BYTES = 16_384


class RawHttp2:
    """One plaintext connection.

    Args:
        address: host:port.
        timeout_s: Longest that a send or a read may wait.
    """

    def __init__(self, address: str, timeout_s: float = 20) -> None:
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s)
        self._timeout_s = timeout_s
        self._received = bytearray()
        self._connection_window = 65_535
        self._initial_window = 65_535
        self._windows: dict[int, int] = {}
        self._next_stream = 1
        self.ended: set[int] = set()
        """Streams the server has ended or reset."""
        self.answered: set[int] = set()
        """Streams the server has sent anything of an answer on."""
        self.closed = False
        """Whether the server has closed the connection, or said that it will."""
        self.max_concurrent_streams: int | None = None
        """As the server's settings say; None while they have not come."""
        # Its own window is wide open, so that answers never wait.
        self._socket.sendall(_PREFACE + _frame(_SETTINGS, 0, 0, struct.pack(">HI", _INITIAL_WINDOW_SIZE, 2**31 - 1)))

    def __enter__(self) -> "RawHttp2":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connection."""
        self._socket.close()

    def call(self, method: str, metadata: Iterable[tuple[str, str]] = ()) -> int:
        """Begins a call of "/package.Service/Method". Returns its stream."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        headers = [(":method", "POST"), (":scheme", "http"), (":path", method), (":authority", "test")]
        headers += [("te", "trailers"), ("content-type", "application/grpc"), *metadata]
        block = b"".join(b"\x00" + _string(name) + _string(value) for name, value in headers)
        self._windows[stream] = self._initial_window
        self._socket.sendall(_frame(_HEADERS, _END_HEADERS, stream, block))
        return stream

    def send(self, stream: int, data: bytes | memoryview, *, wait_s: float | None = None, end: bool = False) -> int:
        """Sends bytes of a call as far as the server lets it.

        Args:
            stream: The call.
            data: A message's five bytes of header, then its content, or a part of that.
            wait_s: How long the server may let it wait before it gives up; None is timeout_s.
            end: Close the call's sending side behind them.

        Returns:
            How many bytes went out.
        """
        left = memoryview(data)
        wait_s = self._timeout_s if wait_s is None else wait_s
        while left and stream not in self.ended and not self.closed:
            room = min(self._connection_window, self._windows[stream], _FRAME_BYTES, len(left))
            if room <= 0:
                if not self.read(wait_s):
                    break
                continue
            last = end and room == len(left)
            try:
                self._socket.sendall(_frame(_DATA, _END_STREAM if last else 0, stream, bytes(left[:room])))
            except OSError:
                self.closed = True
                break
            self._connection_window -= room
            self._windows[stream] -= room
            left = left[room:]
            self.read(0)
        return len(data) - len(left)

    def wait_ended(self, stream: int) -> None:
        """Waits until the server has ended a call."""
        deadline = time.monotonic() + self._timeout_s
        while stream not in self.ended:
            assert not self.closed, "the server closed the connection"
            assert time.monotonic() < deadline, "the server did not end the call"
            self.read(0.2)

    def wait_answered(self, streams: Iterable[int]) -> None:
        """Waits until the server has begun to answer all these calls."""
        deadline = time.monotonic() + self._timeout_s
        while not self.answered.issuperset(streams):
            assert not self.closed, "the server closed the connection"
            assert time.monotonic() < deadline, "the server did not answer"
            self.read(0.2)

    def settings_came(self) -> None:
        """Waits for the server's settings, and with them its windows."""
        deadline = time.monotonic() + self._timeout_s
        while self.max_concurrent_streams is None:
            assert not self.closed, "the server closed the connection"
            assert time.monotonic() < deadline, "the server sent no settings"
            self.read(0.2)

    def read(self, wait_s: float) -> bool:
        """Takes in what the server sent. Whether it sent anything."""
        ready, _, _ = select.select([self._socket], [], [], wait_s)
        if not ready or self.closed:
            return False
        try:
            received = self._socket.recv(1 << 20)
        except OSError:
            received = b""
        if not received:
            self.closed = True
            return False
        self._received += received
        while len(self._received) >= 9:
            length = int.from_bytes(self._received[:3], "big")
            if len(self._received) < 9 + length:
                break
            kind, flags = self._received[3], self._received[4]
            stream = int.from_bytes(self._received[5:9], "big") & 0x7FFFFFFF
            payload = bytes(self._received[9 : 9 + length])
            del self._received[: 9 + length]
            self._take(kind, flags, stream, payload)
        return True

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind in (_DATA, _HEADERS):
            self.answered.add(stream)
        if kind == _WINDOW_UPDATE:
            size = int.from_bytes(payload, "big")
            if stream:
                self._windows[stream] = self._windows.get(stream, 0) + size
            else:
                self._connection_window += size
        elif kind == _SETTINGS and not flags & _ACK:
            self._take_settings(payload)
        elif kind == _PING and not flags & _ACK:
            self._socket.sendall(_frame(_PING, _ACK, 0, payload))
        elif kind == _GOAWAY:
            self.closed = True
        elif kind == _RST_STREAM or (kind in (_DATA, _HEADERS) and flags & _END_STREAM):
            self.ended.add(stream)

    def _take_settings(self, payload: bytes) -> None:
        self.max_concurrent_streams = self.max_concurrent_streams or 2**31 - 1
        for number, value in struct.iter_unpack(">HI", payload):
            if number == _INITIAL_WINDOW_SIZE:
                for stream in self._windows:
                    self._windows[stream] += value - self._initial_window
                self._initial_window = value
            elif number == _MAX_CONCURRENT_STREAMS:
                self.max_concurrent_streams = value
        self._socket.sendall(_frame(_SETTINGS, _ACK, 0, b""))


def message_header(size_bytes: int, *, compressed: bool = False) -> bytes:
    """What stands before a gRPC message of that size."""
    return bytes([compressed]) + size_bytes.to_bytes(4, "big")


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def _string(text: str) -> bytes:
    """HPACK, without Huffman."""
    data = text.encode()
    if len(data) < 127:
        return bytes([len(data)]) + data
    length, rest = bytearray([127]), len(data) - 127
    while rest >= 128:
        length.append(rest % 128 + 128)
        rest //= 128
    length.append(rest)
    return bytes(length) + data
