"""What log lines make of texts that came from outside."""

import io
import json
import logging
from collections.abc import Callable, Iterator

import pytest

from trainer_service.logs import MAX_FIELD_CHARS, configure_logging, quoted, request_id

FORGED = "mine\n2026-01-01 00:00:00.000 INFO    rpc.border: Call. key=ops code=OK \x1b[2J\u202e\r\x85\u2028end"


@pytest.fixture(params=[False, True], ids=["lines", "json"])
def logged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Logs something, and returns what came out."""
    out = io.StringIO()
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    for handler in before:
        # Others' handlers are closed by whoever sets up logging anew.
        root.removeHandler(handler)
    monkeypatch.setattr("sys.stderr", out)
    configure_logging(as_json=request.param)

    def log(message: str, exc_info: bool = False, **fields: object) -> str:
        logging.getLogger("trainer_service.rpc").info(message, extra={"fields": fields}, exc_info=exc_info)
        return out.getvalue()

    yield log
    root.handlers[:] = before
    root.setLevel(level)


def as_fields(line: str) -> dict[str, str]:
    """What a reader of either format takes a line's fields for."""
    if line.startswith("{"):
        return {name: str(value) for name, value in json.loads(line).items()}
    found = {}
    rest = line.partition("Attached. ")[2]
    while rest:
        name, _, rest = rest.partition("=")
        if rest.startswith('"'):
            found[name], end = json.JSONDecoder().raw_decode(rest)
            rest = rest[end:].lstrip()
        else:
            found[name], _, rest = rest.partition(" ")
    return found


def test_a_text_from_outside_makes_no_line_and_no_field_of_its_own(logged: Callable[..., str]):
    token = request_id.set(FORGED)
    try:
        line = logged("Attached.", client_id=FORGED, run_id="run-1", took_ms=1.5)
    finally:
        request_id.reset(token)
    assert line.count("\n") == 1
    assert line[:-1].isprintable()
    fields = as_fields(line[:-1])
    assert {"client_id", "run_id", "took_ms", "request_id"} <= fields.keys()
    assert not {"key", "code"} & fields.keys()
    assert (fields["client_id"], fields["run_id"], fields["took_ms"]) == (FORGED, "run-1", "1.5")


def test_a_long_text_is_cut_and_its_length_told(logged: Callable[..., str]):
    line = logged("Attached.", client_id="x" * 20_000_000)
    assert len(line) < MAX_FIELD_CHARS + 300
    assert "20000000 characters" in line


def test_an_exception_and_a_message_make_no_line_that_looks_like_one_of_ours(logged: Callable[..., str]):
    try:
        raise ValueError(FORGED + "y" * 100_000)
    except ValueError:
        text = logged(FORGED, exc_info=True)
    first, *others = text.rstrip("\n").split("\n")
    assert all(line.isprintable() for line in (first, *others))
    assert all(line.startswith("    ") for line in others)
    assert len(text) < 200_000


@pytest.mark.parametrize("plain", ["run-1", "gradwire://run-1/state/a", 7, 1.5, "OK", None, "é"])
def test_a_plain_word_stands_as_it_is(plain: object):
    assert quoted(plain) == str(plain)


@pytest.mark.parametrize(
    ("value", "shown"),
    [("two words", '"two words"'), ("", '""'), ('say "x"', '"say \\"x\\""'), ("a\\n", '"a\\\\n"'), ("a=b", '"a=b"')],
)
def test_anything_else_is_quoted(value: str, shown: str):
    assert quoted(value) == shown
