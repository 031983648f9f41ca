"""Connections that are abused: HTTP/2 as no client speaks it, byte by byte, frame by frame.

Each abuse is a connection or some, opened, misused and left. What the server answers is read as far as it can be; a status that
is the server's own fault counts, and so does a server that answers a proper call late or not at all while this goes on.
"""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import Awaitable, Callable, Iterable

from hpack import Encoder
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from protos import transformer_pb2 as pb
from tests.load.fuzz.calls import SERVICE
from tests.load.fuzz.line import LISTEN_SECONDS, Line

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_PATH = f"/{SERVICE}/Generate"
_MESSAGE = pb.GenerateRequest(model="encoder_decoder", inputs=[pb.Input(text="abc")]).SerializeToString()
Headers = list[tuple[str, str]]
Abuse = Callable[[int, random.Random], Awaitable[list[Line]]]


def call_headers(**changes: str | None) -> Headers:
    """Of a proper call; None leaves one out."""
    headers: dict[str, str | None] = {
        ":method": "POST",
        ":scheme": "http",
        ":path": _PATH,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
        "grpc-timeout": "20S",
    }
    headers.update({key.replace("pseudo_", ":").replace("_", "-"): value for key, value in changes.items()})
    return [(key, value) for key, value in headers.items() if value is not None]


def framed(message: bytes = _MESSAGE, *, length: int | None = None, flag: int = 0) -> bytes:
    """A message as gRPC puts it into DATA."""
    return struct.pack(">BI", flag, len(message) if length is None else length) + message


def call_frames(
    stream: int, headers: Headers | None = None, body: bytes | None = None, encoder: Encoder | None = None
) -> list[Frame]:
    block = (encoder or Encoder()).encode(headers or call_headers())
    data = framed() if body is None else body
    return [
        HeadersFrame(stream, block, flags=["END_HEADERS"]),
        *(DataFrame(stream, data[at : at + 16_384]) for at in range(0, len(data), 16_384)),
        DataFrame(stream, b"", flags=["END_STREAM"]),
    ]


async def _opened(port: int, *first: bytes | Frame) -> Line:
    """A connection that began as it should."""
    line = await Line.to(port)
    line.write(PREFACE, SettingsFrame(0), *first)
    await line.flush()
    return line


async def _once(port: int, pieces: Iterable[bytes | Frame], seconds: float = LISTEN_SECONDS) -> list[Line]:
    line = await _opened(port, *pieces)
    await line.listen(seconds)
    return [line]


async def wrong_prefaces(port: int, rng: random.Random) -> list[Line]:
    beginnings = [
        rng.randbytes(rng.choice([1, 24, 400])),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(64),
        PREFACE[: rng.randrange(len(PREFACE))],
        PREFACE + PREFACE,
        PREFACE + call_frames(1)[0].serialize(),
    ]
    line = await Line.to(port)
    line.write(rng.choice(beginnings))
    await line.listen()
    return [line]


async def random_frames(port: int, rng: random.Random) -> list[Line]:
    """Any type, any flags, any stream, any length, true or not."""
    frames = []
    for _ in range(rng.randint(1, 50)):
        body = rng.randbytes(rng.choice([0, 1, 4, 5, 8, 6, 100, 2000]))
        length = len(body) if rng.random() < 0.9 else rng.randrange(2**24)
        kind, flags = rng.randrange(12), rng.randrange(256)
        stream = rng.choice([0, 1, 1, 2, 3, 2**31 - 1, rng.randrange(2**32)])
        frames.append(struct.pack(">I", length)[1:] + struct.pack(">BBI", kind, flags, stream) + body)
    return await _once(port, frames)


async def damaged_calls(port: int, rng: random.Random) -> list[Line]:
    """Proper calls with some bytes of their frames changed."""
    encoder = Encoder()
    data = bytearray(b"".join(f.serialize() for n in range(8) for f in call_frames(2 * n + 1, encoder=encoder)))
    for _ in range(rng.randint(1, 6)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return await _once(port, [bytes(data)])


async def truncated_frames(port: int, rng: random.Random) -> list[Line]:
    data = b"".join(frame.serialize() for frame in call_frames(1))
    line = await _opened(port, data[: rng.randrange(1, len(data))])
    line.hang_up(rudely=rng.random() < 0.5)
    return [line]


async def odd_headers(port: int, rng: random.Random) -> list[Line]:
    odd = [
        call_headers(pseudo_path=None),
        call_headers(pseudo_method="GET"),
        call_headers(pseudo_path=""),
        call_headers(pseudo_path="/" * 3000),
        call_headers(pseudo_path=f"/{SERVICE}/Generate\0"),
        call_headers(te=None),
        call_headers(content_type="text/html"),
        call_headers(content_type=None),
        call_headers(grpc_timeout="99999999H"),
        call_headers(grpc_timeout="abc"),
        call_headers(grpc_timeout="-1S"),
        call_headers(grpc_timeout="0n"),
        call_headers(grpc_encoding="br"),
        call_headers(grpc_encoding="gzip"),
        [*call_headers(), (":path", _PATH)],
        [*call_headers(), ("X-Upper", "case")],
        [*call_headers(), ("x-odd-bin", "%%%")],
        [*call_headers(), ("connection", "close"), ("transfer-encoding", "chunked")],
        [*call_headers(), *(("x-many", f"{n}") for n in range(500))],
        call_headers()[::-1],
    ]
    headers = rng.choice(odd)
    encoder = Encoder()
    return await _once(port, [f for n in range(4) for f in call_frames(2 * n + 1, headers, encoder=encoder)])


async def huge_headers(port: int, rng: random.Random) -> list[Line]:
    """Header blocks without an end, or small ones that unpack to much."""
    if rng.random() < 0.5:
        block = Encoder().encode([*call_headers(), ("x-huge", "x" * rng.choice([10_000, 100_000, 1_000_000]))], huffman=False)
        pieces = [block[at : at + 16_000] for at in range(0, len(block), 16_000)]
        frames: list[Frame] = [HeadersFrame(1, pieces[0])]
        frames += [ContinuationFrame(1, piece) for piece in pieces[1:]]
        return await _once(port, frames)
    encoder = Encoder()
    first = encoder.encode([*call_headers(), ("x-bomb", "x" * 3000)])
    again = encoder.encode([("x-bomb", "x" * 3000)])
    frames = [HeadersFrame(1, first, flags=["END_HEADERS"])]
    frames += [HeadersFrame(2 * n + 3, first + again * 2000, flags=["END_HEADERS"]) for n in range(4)]
    return await _once(port, frames)


async def odd_messages(port: int, rng: random.Random) -> list[Line]:
    """Length prefixes that lie, flags without a meaning, too much or nothing at all."""
    bodies = [
        framed(length=2**32 - 1),
        framed(length=len(_MESSAGE) + 7),
        framed(length=len(_MESSAGE) - 3),
        framed(flag=1),
        framed(flag=0x7F),
        framed() + framed(),
        framed(b""),
        b"",
        b"\0\0",
        framed(b"x" * rng.choice([100_000, 9_000_000])),
        framed(rng.randbytes(50)),
    ]
    return await _once(port, call_frames(1, body=rng.choice(bodies)), seconds=0.3)


async def rapid_reset(port: int, rng: random.Random) -> list[Line]:
    """CVE-2023-44487: calls that are begun and reset at once, more than may be open at a time."""
    encoder, frames = Encoder(), list[Frame]()
    for n in range(rng.choice([50, 1500])):
        header, *body = call_frames(2 * n + 1, encoder=encoder)
        frames += [header, *(body if rng.random() < 0.3 else []), RstStreamFrame(2 * n + 1, error_code=8)]
    return await _once(port, frames)


async def floods(port: int, rng: random.Random) -> list[Line]:
    """Thousands of small frames, each of which wants something done."""
    flood = rng.choice(
        [
            lambda n: SettingsFrame(0, {SettingsFrame.INITIAL_WINDOW_SIZE: n}),
            lambda n: PingFrame(0, n.to_bytes(8, "big")),
            lambda n: WindowUpdateFrame(0, window_increment=1),
            lambda n: PriorityFrame(2 * n + 1, depends_on=0, stream_weight=1),
            lambda n: DataFrame(1, b""),
            lambda n: RstStreamFrame(2 * n + 1, error_code=1),
            lambda n: GoAwayFrame(0, last_stream_id=n),
        ]
    )
    return await _once(port, [*call_frames(1)[:1], *(flood(n) for n in range(rng.choice([100, 5000])))])


async def wrong_order(port: int, rng: random.Random) -> list[Line]:
    """Frames that are well-formed and come where they must not."""
    header, data, end = call_frames(1)[0], DataFrame(1, framed()), DataFrame(1, b"", flags=["END_STREAM"])
    orders: list[list[Frame]] = [
        [data, header, end],
        [header, header, data, end],
        [header, end, data, end],
        [*call_frames(2)],
        [*call_frames(5), *call_frames(3)],
        [ContinuationFrame(1, b"\0")],
        [HeadersFrame(1, b"\x82"), PingFrame(0, b"12345678"), data],
        [GoAwayFrame(0, last_stream_id=0), *call_frames(1)],
        [WindowUpdateFrame(0, window_increment=2**31 - 1), WindowUpdateFrame(0, window_increment=2**31 - 1)],
        [SettingsFrame(0, {SettingsFrame.MAX_FRAME_SIZE: 1}), *call_frames(1)],
        [SettingsFrame(0, {SettingsFrame.INITIAL_WINDOW_SIZE: 2**32 - 1}), *call_frames(1)],
        [HeadersFrame(1, b"\xff\xff\xff\xff\xff\xff\xff", flags=["END_HEADERS"])],
    ]
    return await _once(port, rng.choice(orders))


async def too_many_streams(port: int, rng: random.Random) -> list[Line]:
    """More calls open at once than a connection may have, none of which goes on."""
    encoder = Encoder()
    return await _once(port, [call_frames(2 * n + 1, encoder=encoder)[0] for n in range(1500)])


async def slow_writers(port: int, rng: random.Random) -> list[Line]:
    """A proper call, a few bytes at a time: it is answered, or refused because the server is busy."""
    line = await _opened(port)
    data = b"".join(frame.serialize() for frame in call_frames(1))
    step = rng.choice([7, 23])
    for at in range(0, len(data), step):
        line.write(data[at : at + step])
        await line.flush()
        await asyncio.sleep(0.002)
    await line.listen(20.0, until_status=True)
    if not line.statuses.keys() & {"0", "8"}:
        line.faults.append(f"a slow caller got {dict(line.statuses)} {line.words}, closed: {line.closed}")
    return [line]


async def no_readers(port: int, rng: random.Random) -> list[Line]:
    """Streams whose reader grants no window, left as they are."""
    line = await _opened(port, SettingsFrame(0, {SettingsFrame.INITIAL_WINDOW_SIZE: 0}))
    encoder = Encoder()
    headers = call_headers(pseudo_path=f"/{SERVICE}/GenerateStream", grpc_timeout="2S")
    for n in range(10):
        line.write(*call_frames(2 * n + 1, headers, encoder=encoder))
    await line.flush()
    await line.listen()
    return [line]


async def half_open(port: int, rng: random.Random) -> list[Line]:
    """Connections that begin and then say nothing, some of them in the middle of a call."""
    lines = [await Line.to(port) for _ in range(8)]
    for line in lines:
        line.write(*rng.choice([[], [PREFACE], [PREFACE, SettingsFrame(0)], [PREFACE, SettingsFrame(0), *call_frames(1)[:2]]]))
    await asyncio.sleep(0.05)
    return lines


ABUSES: tuple[Abuse, ...] = (
    wrong_prefaces,
    random_frames,
    damaged_calls,
    truncated_frames,
    odd_headers,
    huge_headers,
    odd_messages,
    rapid_reset,
    floods,
    wrong_order,
    too_many_streams,
    slow_writers,
    no_readers,
    half_open,
)
