"""Messages cut out of a stream of bytes, however it comes."""

import random

import pytest

from trainer_service.worker_frames import Frames, OversizedFrameError, frame


def received(stream: bytes, sizes: list[int]) -> list[bytes]:
    """What comes of a stream that arrives in reads of these sizes, again and again."""
    frames, found, place, number = Frames(1 << 20), [], 0, 0
    while place < len(stream):
        room = frames.room()
        assert len(room)
        count = min(len(room), sizes[number % len(sizes)], len(stream) - place)
        room[:count] = stream[place : place + count]
        place, number = place + count, number + 1
        found += [bytes(message) for message in frames.arrived(count)]
    return found


@pytest.mark.parametrize("sizes", [[1 << 20], [1 << 16], [1], [3], [65535, 1, 2], [1000, 70000]])
def test_messages_of_any_length_come_as_they_were_sent(sizes: list[int]):
    chance = random.Random(0)
    around = [0, 1, 3, 4, 65528, 65531, 65532, 65533, 65536, 65540, 200_000, 1, 0, 70_000]
    lengths = around if max(sizes) > 3 else [0, 1, 5, 65530, 65536, 7]
    messages = [chance.randbytes(length) for length in lengths]
    assert received(b"".join(frame(message[:1], message[1:]) for message in messages), sizes) == messages


def test_a_message_beyond_the_limit_is_refused():
    frames = Frames(10)
    frames.room()[:15] = frame(bytes(11))
    with pytest.raises(OversizedFrameError, match="a message of 11 bytes; at most 10 are allowed"):
        list(frames.arrived(15))
