"""Structured logs: one JSON object a line, each with the id of the request it was written for."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum
from typing import TextIO

from server.call import current_call


class LogLevel(StrEnum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}


class JsonFormatter(logging.Formatter):
    """Every key given as ``extra`` becomes a key of the object; an exception becomes one text with its traceback."""

    def __init__(self, facts: Mapping[str, object] | None = None) -> None:
        super().__init__()
        self._facts = dict(facts or {})

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._facts,
        }
        if (call := current_call.get(None)) is not None:
            entry["request_id"] = call.request_id
            entry["trace_id"], entry["span_id"] = call.trace.trace_id, call.trace.span_id
        entry.update((key, value) for key, value in record.__dict__.items() if key not in _STANDARD)
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


def configure_logging(level: LogLevel, stream: TextIO | None = None, **facts: object) -> None:
    """Sends every log of this process, the libraries' included, through one formatter to standard error.

    Args:
        facts: keys that every line gets: which of several processes says it.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(facts))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
