from __future__ import annotations

import contextvars
import io
import json
import logging
import sys
from typing import Any

from server.call import Call, Trace, current_call
from server.logs import JsonFormatter

TRACE = Trace.continued(f"00-{'a' * 32}-{'b' * 16}-01")


def entry(log: logging.Logger, **fields: Any) -> dict[str, Any]:
    record = log.makeRecord(log.name, logging.INFO, "file", 1, "said %s", ("ä\n",), None, extra=fields)
    line = JsonFormatter().format(record)
    assert "\n" not in line
    parsed: dict[str, Any] = json.loads(line)
    return parsed


def test_a_record_is_one_line_of_json_with_its_fields() -> None:
    made = entry(logging.getLogger("a.b"), model="dates")
    assert made.pop("time").endswith("+00:00")
    assert made == {"level": "info", "logger": "a.b", "message": "said ä\n", "model": "dates"}


def test_a_record_carries_the_request_id_of_the_running_call() -> None:
    def within() -> dict[str, Any]:
        current_call.set(Call(method="Generate", request_id="r-1", trace=TRACE))
        return entry(logging.getLogger("x"))

    made = contextvars.copy_context().run(within)
    assert (made["request_id"], made["trace_id"], made["span_id"]) == ("r-1", "a" * 32, TRACE.span_id)
    assert not {"request_id", "trace_id", "span_id"} & entry(logging.getLogger("x")).keys()


def test_an_exception_is_one_field() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    try:
        raise KeyError("k")
    except KeyError:
        handler.handle(logging.makeLogRecord({"msg": "broke", "exc_info": sys.exc_info()}))
    assert json.loads(stream.getvalue())["exception"].endswith("KeyError: 'k'")
