"""What the command line prints."""

import io

import pytest
from gradwire._client.terminal import ProgressBar, print_message, print_table, size_text
from gradwire.v1 import checkpoint_pb2


class Screen(io.StringIO):
    """A terminal of the default width."""

    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def _terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")


def test_a_bar_is_drawn_over_until_its_file_is_whole(clock: Clock):
    screen = Screen()
    bar = ProgressBar(screen, clock=clock)
    for done_bytes in (0, 512, 1024):
        bar.update("a", done_bytes, 1024)
        clock.now_s += 1
    bar.update("b", 2048, 2048)
    bar.close()
    assert screen.getvalue() == (
        "\r\x1b[K[          ]   0%      0.0 of 1.0 KiB                a"
        "\r\x1b[K[#####     ]  50%      0.5 of 1.0 KiB  512 B/s       a"
        "\r\x1b[K[##########] 100%             1.0 KiB  512 B/s       a\n"
        "\r\x1b[K[##########] 100%             2.0 KiB  here already  b\n"
    )


def test_a_bar_moves_ten_times_a_second_and_lines_come_every_five(clock: Clock):
    screen, log = Screen(), io.StringIO()
    bars = [ProgressBar(screen, clock=clock), ProgressBar(log, clock=clock)]
    for number in range(1000):
        for bar in bars:
            bar.update("a", number, 1000)
        clock.now_s += 1 / 64
    # 1000 / 64 s; the bar's first is its beginning.
    assert screen.getvalue().count("\r") == 1 + 999 // 7
    assert log.getvalue().splitlines() == [f"a: {p}%, {p * 10} of 1000 B, 64 B/s" for p in (32, 64, 96)]


def test_a_bar_is_not_wider_than_the_terminal_and_shows_both_ends_of_a_name(clock: Clock):
    screen = Screen()
    ProgressBar(screen, clock=clock).update("model-00001-of-" + "x" * 200 + ".safetensors", 0, 150 << 20)
    [line] = screen.getvalue().removeprefix("\r\x1b[K").splitlines()
    assert len(line) == 79
    assert "model-0" in line
    assert line.endswith("tensors")


def test_nothing_is_drawn_after_the_end_and_a_half_drawn_bar_gets_its_line_ended():
    screen = Screen()
    bar = ProgressBar(screen)
    bar.update("a", 1, 1024)
    bar.close()
    drawn = screen.getvalue()
    assert drawn.endswith("a\n")
    bar.update("a", 512, 1024)
    bar.update("a", 1024, 1024)
    assert screen.getvalue() == drawn


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "dumb")
    screen = Screen()
    ProgressBar(screen).update("a", 1, 2)
    assert screen.getvalue() == "a: 50%, 1 of 2 B, goes on from there\n"


def test_what_is_not_quite_whole_is_not_called_so_and_nothing_is_divided_by(clock: Clock):
    log = io.StringIO()
    bar = ProgressBar(log, clock=clock)
    bar.update("a", 999_999, 1_000_000)
    bar.update("b", 0, 0)
    assert log.getvalue().splitlines() == ["a: 99%, 976.6 of 976.6 KiB, goes on from there", "b: 100%, 0 B"]


def test_names_cannot_steer_a_terminal(capsys: pytest.CaptureFixture[str]):
    print_table([("NAME", "STEP"), ("a\x1b]0;b\a\nc", "3")])
    log = io.StringIO()
    ProgressBar(log).update("a\x1b[2J", 1, 1)
    assert capsys.readouterr().out == "NAME              STEP\na\\x1b]0;b\\x07\\nc  3\n"
    assert log.getvalue().startswith("a\\x1b[2J: ")


def test_a_message_is_shown_in_words_and_in_its_own_order(capsys: pytest.CaptureFixture[str]):
    message = checkpoint_pb2.Checkpoint(
        path="gradwire://run-1/sampler_weights/a",
        kind=checkpoint_pb2.CHECKPOINT_KIND_SAMPLER_WEIGHTS,
        size_bytes=3 << 20,
        lora=checkpoint_pb2.LoraLayout(lora_alpha=32, train_mlp=True),
        files=[
            checkpoint_pb2.CheckpointFile(name="empty", sha256="e3"),
            checkpoint_pb2.CheckpointFile(name="model.safetensors", size_bytes=5, sha256="f4"),
        ],
    )
    print_message(message)
    assert capsys.readouterr().out == (
        "path                gradwire://run-1/sampler_weights/a\n"
        "kind                sampler_weights\n"
        "size_bytes          3145728 (3.0 MiB)\n"
        "step                0\n"
        "lora_rank           0\n"
        "checkpoint_type     unspecified\n"
        "lora.lora_alpha     32.0\n"
        "lora.train_mlp      true\n"
        "lora.train_attn     false\n"
        "lora.train_unembed  false\n"
        "files:\n"
        "  empty              0  e3\n"
        "  model.safetensors  5  f4\n"
    )


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 40, "5.0 TiB"), (3 << 50, "3072.0 TiB")],
)
def test_sizes_are_told_in_their_unit(size_bytes: int, text: str):
    assert size_text(size_bytes) == text
