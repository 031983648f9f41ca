"""By how much a front end's memory may grow with the calls that it gets.

One leak is known, and gRPC's: what a batch of operations takes that fails is never freed (github.com/grpc/grpc/issues/43360),
and the first batch of a call fails when the call ends before it was read. Each call that was left may have been such a one.
"""

from __future__ import annotations

MOST_BYTES = 16.0
"""For each call: at 40 calls a second, 2 MB in an hour."""
GRPC_BYTES = 96.0
"""Kept by grpc.aio of a call that ended before it was read: one operation of 80 bytes, as malloc rounds it up."""
WARM_BYTES = 8 * 2**20
"""Of caches and pools that fill up: about 4 MB with one model."""
