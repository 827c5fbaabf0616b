"""Messages between trainer and worker on their unix socket: a length, then the message. Ground floor, and light.

The two run on one machine, are of one version and know one another by a token, so that a stream of bytes is all they
need: over gRPC a message and its answer took 0.4 ms and as many hops between threads, over the socket 0.05.
"""

from collections.abc import Iterator

_LENGTH_BYTES = 4
_BUFFER_BYTES = 1 << 16
"""Messages up to this length are read many at a time."""


class OversizedFrameError(Exception):
    """The peer announces a message beyond the limit: it speaks something else."""


def frame(*parts: bytes | memoryview) -> bytes:
    """A message, given in parts, as it goes over the socket."""
    return b"".join((sum(map(len, parts)).to_bytes(_LENGTH_BYTES, "little"), *parts))


class Frames:
    """Takes bytes as they come, and gives whole messages. A large one is read to where it stays.

    Args:
        max_bytes: Limit on one message.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._end = 0  # Of what is in the buffer.
        self._large = bytearray()  # A message that does not fit in there.
        self._missing = 0  # Bytes of that.

    def room(self) -> memoryview:
        """Where the next bytes go; never empty."""
        if self._missing:
            return memoryview(self._large)[-self._missing :]
        return self._buffer[self._end :]

    def arrived(self, count: int) -> Iterator[bytes | bytearray]:
        """So many bytes were put into `room`. Yields the messages that they complete.

        Raises:
            OversizedFrameError: A message is too long.
        """
        if self._missing:
            self._missing -= count
            if not self._missing:
                message, self._large = self._large, bytearray()
                yield message
            return
        self._end += count
        begin = 0
        while self._end - begin >= _LENGTH_BYTES:
            start = begin + _LENGTH_BYTES
            size = int.from_bytes(self._buffer[begin:start], "little")
            if size > self._max_bytes:
                raise OversizedFrameError(f"a message of {size} bytes; at most {self._max_bytes} are allowed")
            if start + size > self._end:
                if _LENGTH_BYTES + size > _BUFFER_BYTES:
                    there = self._end - start
                    self._large, self._missing = bytearray(size), size - there
                    self._large[:there] = self._buffer[start : self._end]
                    begin = self._end
                break
            begin = start + size
            yield bytes(self._buffer[start:begin])
        # What has begun moves to the front, so that the rest of it has room.
        left = self._end - begin
        if begin and left:
            self._buffer[:left] = bytes(self._buffer[begin : self._end])
        self._end = left
