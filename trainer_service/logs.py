"""Log lines and request ids. Ground floor; metrics are in metrics.py, traces in tracing.py."""

import contextvars
import json
import logging
import re
import sys
import time

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")
"""Id of the call being served; every log line of the call has it."""


MAX_FIELD_CHARS = 200
"""Longest field value in a log line; much of it comes from outside."""
_MAX_MESSAGE_CHARS = 4096
_MAX_EXCEPTION_CHARS = 16_384
_PLAIN = re.compile(r"""[^\s"'=\\]+""")


def quoted(value: object) -> str:
    """A field's value for a log line: one word, or a JSON string that cannot pass for another field, end the line or
    control a terminal; cut off after MAX_FIELD_CHARS."""
    text = _cut(str(value))
    if _PLAIN.fullmatch(text) and text.isprintable():
        return text
    return _on_one_line(json.dumps(text, ensure_ascii=False))


def _cut(text: str) -> str:
    return text if len(text) <= MAX_FIELD_CHARS else f"{text[:MAX_FIELD_CHARS]}…({len(text)} characters)"


def _on_one_line(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


class _Lines(logging.Formatter):
    """`12:00:01.234 INFO trainer.rpc message request_id=…`, for people; extra fields as key=value.

    An exception follows on lines that begin with spaces, so that none can pass for a log line, whatever it contains.
    """

    default_time_format = "%Y-%m-%d %H:%M:%S"
    default_msec_format = "%s.%03d"

    def format(self, record: logging.LogRecord) -> str:
        line = f"{self.formatTime(record)} {record.levelname:<7} {record.name.removeprefix('trainer_service.')}: "
        line += _on_one_line(record.getMessage()[:_MAX_MESSAGE_CHARS])
        for name, value in _fields(record).items():
            line += f" {name}={quoted(value)}"
        if record.exc_info:
            # The end of a traceback names the exception.
            text = self.formatException(record.exc_info)[-_MAX_EXCEPTION_CHARS:]
            line += "".join(f"\n    {_on_one_line(part)}" for part in text.splitlines())
        return line


class _Json(logging.Formatter):
    """One JSON object per line, for machines."""

    def format(self, record: logging.LogRecord) -> str:
        fields = _fields(record)
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage()[:_MAX_MESSAGE_CHARS],
            **{name: value if isinstance(value, _JSON_NUMBERS) else _cut(str(value)) for name, value in fields.items()},
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)[-_MAX_EXCEPTION_CHARS:]
        return json.dumps(entry)


_JSON_NUMBERS = (bool, int, float, type(None))


def _fields(record: logging.LogRecord) -> dict[str, object]:
    fields = dict(getattr(record, "fields", {}))
    if current := request_id.get():
        fields["request_id"] = current
    return fields


def configure_logging(*, as_json: bool, level: str = "INFO") -> None:
    """Sends all logs to stderr, one line per event."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if as_json else _Lines())
    logging.basicConfig(level=level, handlers=[handler], force=True)
