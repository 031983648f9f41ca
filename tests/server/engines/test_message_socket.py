"""Messages between our processes arrive whole and in order, however the bytes come; the end of the other side is noticed."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
import tracemalloc
from contextlib import closing

import pytest

from server.engines.message_socket import BlockingSocket, LoopSocket
from server.engines.wire import WireError

RNG = random.Random(0)
MESSAGES = [b"", b"x", *(RNG.randbytes(RNG.choice([3, 300, 70_000])) for _ in range(40)), RNG.randbytes(3_000_000)]


def decode(data: bytes) -> bytes:
    if data == b"nonsense":
        raise WireError("nonsense")
    return data


class Ends:
    """An end in the event loop, and the bare socket at the other."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.nonsense = 0
        ours, self.other = socket.socketpair()
        self._ours = ours
        self.end = LoopSocket(decode, self.heard.append, self._on_nonsense)

    async def open(self) -> Ends:
        await self.end.open(self._ours)
        return self

    def _on_nonsense(self) -> None:
        self.nonsense += 1


async def until_heard(ends: Ends, count: int) -> None:
    async with asyncio.timeout(10):
        while len(ends.heard) < count:
            await asyncio.sleep(0.001)


async def test_messages_cross_in_both_directions() -> None:
    ends = await Ends().open()
    blocking = BlockingSocket(ends.other)

    def echo() -> None:
        count = 0
        while count < len(MESSAGES):
            for message in blocking.receive(wait=True):
                blocking.send(message)
                count += 1

    thread = threading.Thread(target=echo)
    thread.start()
    for message in MESSAGES:
        ends.end.send(message)
    await until_heard(ends, len(MESSAGES))
    thread.join()
    assert ends.heard == MESSAGES
    ends.end.close()
    ends.other.close()


@pytest.mark.parametrize("size", [1, 3, 7])
async def test_a_message_may_come_byte_by_byte(size: int) -> None:
    ends = await Ends().open()
    ours, its = socket.socketpair()
    blocking, received = BlockingSocket(ours), []
    data = b"".join(struct.pack("!I", len(message)) + message for message in MESSAGES[:5])[:2000]
    whole = [b"", b"x"]
    for at in range(0, len(data), size):
        ends.other.sendall(data[at : at + size])
        its.sendall(data[at : at + size])
        received += blocking.receive(wait=False)
        await asyncio.sleep(0)
    await until_heard(ends, len(received))
    assert ends.heard[:2] == received[:2] == whole
    assert ends.heard == received == MESSAGES[: len(received)]
    ends.end.close()
    for one in (ends.other, ours, its):
        one.close()


def test_nothing_is_waited_for_unless_that_is_asked() -> None:
    ours, its = socket.socketpair()
    blocking = BlockingSocket(ours)
    assert blocking.receive(wait=False) == []
    its.sendall(struct.pack("!I", 3) + b"a")
    assert blocking.receive(wait=False) == []
    threading.Timer(0.05, its.sendall, [b"bc"]).start()
    assert blocking.receive(wait=True) == [b"abc"]
    its.close()
    for wait in (False, True):
        with pytest.raises(EOFError):
            blocking.receive(wait=wait)
    ours.close()


async def test_what_was_said_before_the_end_is_heard() -> None:
    ends = await Ends().open()
    BlockingSocket(ends.other).send(b"last words")
    ends.other.close()
    await asyncio.wait_for(ends.end.ended, 10)
    assert ends.heard == [b"last words"]
    ends.end.send(b"to nobody")
    ends.end.close()


async def test_nothing_is_read_after_nonsense() -> None:
    ends = await Ends().open()
    blocking = BlockingSocket(ends.other)
    for message in (b"first", b"nonsense", b"second", b"nonsense"):
        blocking.send(message)
    await asyncio.wait_for(ends.end.ended, 10)
    assert (ends.heard, ends.nonsense) == ([b"first"], 1)
    ends.other.close()


async def test_a_message_that_cannot_be_dealt_with_ends_the_connection() -> None:
    """Rather than to go on as if it had not come: the other end is replaced, and callers are told."""
    ours, other = socket.socketpair()
    end = LoopSocket(decode, lambda message: heard.append(1 // len(message)), print)
    heard: list[int] = []
    await end.open(ours)
    blocking = BlockingSocket(other)
    for message in (b"x", b"", b"y"):
        blocking.send(message)
    await asyncio.wait_for(end.ended, 10)
    assert heard == [1]
    with pytest.raises(EOFError):
        blocking.receive(wait=True)
    other.close()


async def test_what_was_sent_is_delivered_though_the_end_is_closed() -> None:
    ends = await Ends().open()
    blocking = BlockingSocket(ends.other)
    ends.end.send(MESSAGES[-1])
    ends.end.close()
    assert await asyncio.to_thread(blocking.receive, wait=True) == [MESSAGES[-1]]
    await asyncio.wait_for(ends.end.ended, 10)
    ends.other.close()


async def test_reading_takes_no_memory_but_the_messages() -> None:
    """A buffer for each read, cut down to what came, leaves holes that the C library's heap grows around."""
    ends = await Ends().open()
    ours, its = socket.socketpair()
    blocking, message = BlockingSocket(ours), b"\0\0\0\1m"
    with closing(ours), closing(its), closing(ends.other):
        tracemalloc.start()
        try:
            for heard in range(1, 10):
                its.sendall(message)
                assert blocking.receive(wait=True) == [b"m"]
                ends.other.sendall(message)
                await until_heard(ends, heard)
            taken = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert taken < 32 * 1024
        ends.end.close()
