from __future__ import annotations

import pytest

from server.call import Trace

A, B = "a" * 32, "b" * 16


def test_a_callers_trace_goes_on_with_a_span_of_its_own() -> None:
    trace = Trace.continued(f"00-{A}-{B}-01")
    assert (trace.trace_id, trace.parent_id, trace.flags) == (A, B, "01")
    assert trace.span_id not in (B, Trace.continued(f"00-{A}-{B}-01").span_id)
    assert trace.header == f"00-{A}-{trace.span_id}-01"
    assert Trace.continued(trace.header).parent_id == trace.span_id


@pytest.mark.parametrize(
    "header",
    [
        None,
        b"00",
        "",
        f"00-{A}-{B}",
        f"00-{A.upper()}-{B}-01",
        f"00-{'0' * 32}-{B}-01",
        f"00-{A}-{'0' * 16}-01",
        f"ff-{A}-{B}-01",
        f"00-{A}-{B}-01\n",
    ],
)
def test_what_the_standard_does_not_allow_begins_a_new_trace(header: str | bytes | None) -> None:
    trace = Trace.continued(header)
    assert trace.parent_id == ""
    assert trace.trace_id != A
    assert len(trace.header) == 55
