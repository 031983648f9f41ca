"""Mutated requests to the service's own methods, in this process: decoding, conversion, validation and admission, but no gRPC.

Many times as fast as calls over a connection, and counted apart from them.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from server.call import Call, Outcome, current_call
from server.edge.errors import verdict_on
from server.edge.service import TransformerService
from server.metrics import Metrics
from server.models import Models
from server.waiting.admission import AdmissionLimits
from server.waiting.waiting_room import WaitingRoom
from tests.load.fuzz.calls import request_of
from tests.load.fuzz.mutation import METHODS
from tests.server.fake_engine import FakeEngine
from tests.server.run_server import encoder, served_model

_CLASSES = {method.name: GetMessageClass(method.input_type) for method in METHODS}


class _Context:
    """As much of a ``grpc.aio.ServicerContext`` as the service uses."""

    async def write(self, message: Message) -> None:
        message.SerializeToString()


async def through_the_service(seed: int, numbers: range) -> tuple[Counter[str], list[str]]:
    """Sends requests ``numbers`` to a service whose engines answer at once.

    Returns:
        How they ended, and each end that is a fault of the service.
    """
    models = Models(
        [
            served_model(FakeEngine(), name="encoder_decoder"),
            served_model(FakeEngine(), name="decoder_only", family="decoder_only"),
            encoder(FakeEngine(), name="encoder_only"),
        ]
    )
    rooms = {model.name: WaitingRoom(model.engine, AdmissionLimits()) for model in models}
    service = TransformerService(models, rooms, Metrics("fuzz"), write_timeout_seconds=5)
    service.open = True
    context: Any = _Context()
    ends: Counter[str] = Counter()
    problems: list[str] = []
    for number in numbers:
        request = request_of(seed, number)
        name = request.method.name
        try:
            message = _CLASSES[name].FromString(request.data)
        except DecodeError:
            ends["not a message"] += 1
            continue
        current_call.set(Call(name, f"{number}", longest_seconds=60))
        try:
            answer = await getattr(service, name)(message, context)
            if answer is not None:
                answer.SerializeToString()
            ends["answered"] += 1
        except Exception as error:
            verdict = verdict_on(error)
            ends[verdict.reason] += 1
            if verdict.outcome is Outcome.FAILED:
                problems.append(f"request {number}, {name}: {error!r}")
    return ends, problems
