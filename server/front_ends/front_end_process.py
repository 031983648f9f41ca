"""One front end of a server: ``python -m server.front_ends.front_end_process DESCRIPTOR``.

``server.front_ends.front_end`` starts it. It takes calls on a port that it shares with its siblings, checks them, and hands
their requests to the process that owns the engines. It never outlives that process (``server.engines.parent``).
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from export.bundle import BundleError
from server.call import Call
from server.config import ConfigError
from server.device.session import RuntimeUnavailable
from server.engines.engine_client import EngineClient
from server.engines.engine_spec import EngineSpec
from server.engines.message_socket import LoopSocket
from server.engines.parent import die_with_parent
from server.engines.stepper import Request
from server.engines.wire import unwrap_events, wrap_request
from server.front_ends.front_wire import (
    Alive,
    Answers,
    Begin,
    CannotBegin,
    FromFrontEnd,
    Handover,
    Orders,
    Standing,
    ToFrontEnd,
    Withdrawal,
    decode_to_front_end,
    encode,
)
from server.front_ends.remote_room import RemoteRoom
from server.lifecycle import CannotServe
from server.loading import describe_model
from server.logs import LogLevel, configure_logging
from server.metrics import CallMetrics
from server.server import Server

_log = logging.getLogger(__name__)


class FrontEndMetrics(CallMetrics):
    """Counts calls, and remembers what health says."""

    def __init__(self) -> None:
        super().__init__()
        self.ready = False

    def set_ready(self, ready: bool) -> None:
        self.ready = ready


class Owner:
    """The process that owns the engines, as seen from here."""

    def __init__(self) -> None:
        self.begin: asyncio.Future[Begin] = asyncio.get_running_loop().create_future()
        self.metrics = FrontEndMetrics()
        self._rooms: list[RemoteRoom] = []
        self._orders: list[Handover | Withdrawal] = []
        """To be sent in one message, at the end of this turn of the event loop."""
        self._handovers: dict[tuple[int, int], Handover] = {}
        """Those among them, by model and call."""
        self._loop = asyncio.get_running_loop()
        self._socket: LoopSocket[ToFrontEnd] = LoopSocket(decode_to_front_end, self._receive, on_nonsense=self._lose)

    async def open(self, descriptor: int) -> None:
        await self._socket.open(socket.socket(fileno=descriptor))

    async def close(self) -> None:
        """When all that was said is on its way."""
        self._socket.close()
        await self._socket.ended

    def rooms(self, count: int) -> Sequence[RemoteRoom]:
        """One for each model."""
        self._rooms = [RemoteRoom(model, self) for model in range(count)]
        return self._rooms

    def say(self, message: FromFrontEnd) -> None:
        self._socket.send(encode(message))

    def hand_over(self, model: int, call: Call, request: Request) -> None:
        handover = self._handovers.get((model, id(call)))
        if handover is None:
            handover = Handover(
                model, call.request_id, call.trace, call.tenant, call.priority, call.started, call.longest_seconds, []
            )
            self._handovers[model, id(call)] = handover
            self._order(handover)
        handover.requests.append(wrap_request(request))

    def withdraw(self, model: int, request_id: str) -> None:
        self._order(Withdrawal(model, request_id))

    def _order(self, item: Handover | Withdrawal) -> None:
        if not self._orders:
            self._loop.call_soon(self._flush)
        self._orders.append(item)

    def _flush(self) -> None:
        orders, self._orders = self._orders, []
        self._handovers.clear()
        self.say(Orders(tuple(orders)))

    def _receive(self, message: ToFrontEnd) -> None:
        if isinstance(message, Answers):
            for model, events in message.events.items():
                self._rooms[model].deliver(unwrap_events(events))
        elif isinstance(message, Standing):
            if self._rooms:  # until they are there, this process is still reading its bundles
                for room, status in zip(self._rooms, message.statuses, strict=True):
                    room.stand(status)
                self.say(Alive(self.metrics.ready))
        elif not self.begin.done():
            self.begin.set_result(message)

    def _lose(self) -> None:
        for room in self._rooms:
            room.lose()


async def serve(descriptor: int) -> int:
    """The exit code: 0 when asked to end, 1 when it could not begin."""
    owner = Owner()
    await owner.open(descriptor)
    begin = await owner.begin
    configure_logging(LogLevel(begin.log_level), front_end=begin.number)
    try:
        server = _make_server(begin, owner)
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, server.ask_to_stop)
        gc.collect()
        gc.freeze()  # as ``server.__main__`` does
        owner.say(Alive(serving=False))
        await server.serve()
    except (BundleError, ConfigError, RuntimeUnavailable, CannotServe) as error:
        owner.say(CannotBegin(str(error)))
        await owner.close()
        return 1
    return 0


def _make_server(begin: Begin, owner: Owner) -> Server:
    rooms = owner.rooms(len(begin.bundles))
    models = []
    for (path, fingerprint), room in zip(begin.bundles, rooms, strict=True):
        models.append(describe_model(Path(path), begin.engine, partial(_in_place_of_engines, room)))
        if models[-1].fingerprint != fingerprint:
            raise BundleError(f"{path}: is not the bundle that the server was started with")
    own_rooms = {model.name: room for model, room in zip(models, rooms, strict=True)}
    return Server(models, begin.server, owner.metrics, own_rooms)


def _in_place_of_engines(room: RemoteRoom, name: str, spec: EngineSpec, count: int) -> EngineClient:
    return room


def main(descriptor: int) -> int:
    # The owner of the engines hears of a Ctrl-C and says when to end; a SIGTERM before there is a server ends this at once.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    try:
        return asyncio.run(serve(descriptor))
    except Exception:
        _log.exception("the front end stopped")
        return 70


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].isdecimal():
        sys.exit("usage: python -m server.front_ends.front_end_process DESCRIPTOR (started by the server itself)")
    sys.exit(main(int(sys.argv[1])))
