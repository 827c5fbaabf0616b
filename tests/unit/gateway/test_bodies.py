"""Bodies read field by field."""

import pytest

from trainer_service.gateway.bodies import parse_fields
from trainer_service.gateway.outcomes import Refusal


@pytest.mark.parametrize(
    ("body", "read", "message"),
    [
        (b'{"a": 1}', lambda f: f.text("a"), "a is a number; it must be a string."),
        (b"{}", lambda f: f.text("a"), "a is missing; it must be a string."),
        (b'{"a": true}', lambda f: f.integer("a"), "a is True; it must be an integer"),
        (b'{"a": 1.5}', lambda f: f.integer("a"), "a is a number; it must be an integer."),
        (b'{"a": 99}', lambda f: f.integer("a", high=9), "a is 99; it must be an integer from"),
        (b'{"a": 1e400}', lambda f: f.number("a"), "a is inf; it must be a finite number."),
        (b'{"b": {"c": 1}}', lambda f: f.fields("b").finish(), "b.c is not known"),
        (b'{"a": [1]}', lambda f: f.refuse("a", "Leave it."), "a is not served by this gateway. Leave it."),
        (b"[1]", lambda f: None, "The body is a list; it must be a JSON object."),
        (b'{"a": NaN}', lambda f: None, "NaN is no JSON number"),
    ],
)
def test_what_is_wrong_is_told_by_its_path(body: bytes, read: object, message: str):
    with pytest.raises(Refusal, match=message.replace("(", r"\(")):
        read(parse_fields(body))  # pyright: ignore[reportCallIssue]


def test_what_nobody_read_is_refused_and_null_is_as_absent():
    fields = parse_fields(b'{"a": "x", "b": null, "c": 2}')
    assert fields.text("a") == "x"
    assert fields.text("b", "default") == "default"
    with pytest.raises(Refusal, match="c is not known"):
        fields.finish()
