"""Does this machine compute what the bundle's certificate speaks of? Asked of an engine before it answers anybody."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from export.bundle import Bundle, KnownAnswer
from server.device.session import RuntimeUnavailable
from server.engines.stepper import Request, Stepper
from server.requests import Decoding, Encoded, EncodingRequest, Event, Finished, GenerationRequest


def self_test(engine: Stepper, bundle: Bundle, precision: str) -> float:
    """Gives the engine, which must be idle, the inputs of the bundle's known answers, all at once.

    Returns:
        By how much the values differ from the known ones, on average.

    Raises:
        BundleError: for a file of known answers that holds something else.
        RuntimeUnavailable: when they differ by more than the bundle allows.
    """
    known = bundle.known_answers(precision)
    last = _ask(engine, [_request(str(i), answer, bundle.manifest.model) for i, answer in enumerate(known.answers)])
    differences = [d for answer, event in zip(known.answers, last, strict=True) for d in _differences(answer, event)]
    mean = statistics.fmean(differences)
    if not mean <= known.most_difference:  # written so that a NaN fails
        raise RuntimeUnavailable(
            f"{bundle.root}: {precision} computes something else here than where it was exported: known answers differ by"
            f" {mean:.2g} on average, {known.most_difference:g} allowed (another processor, driver or ONNX Runtime?)"
        )
    return mean


def _request(name: str, answer: KnownAnswer, model: dict[str, object]) -> Request:
    if model["family"] == "encoder_only":
        return EncodingRequest(id=name, input_ids=tuple(answer.input))
    return GenerationRequest(
        id=name,
        input_ids=tuple(answer.input),
        decoding=Decoding(max_tokens=len(answer.output)),
        forced=tuple(answer.output),
        forced_only=True,
    )


def _ask(engine: Stepper, requests: Sequence[Request]) -> list[Event]:
    """The last event of each request, in order."""
    for request in requests:
        engine.submit(request)
    last = dict[str, Event]()
    while engine.has_work:
        last |= dict(engine.step()[0])
    return [last[request.id] for request in requests]


def _differences(answer: KnownAnswer, event: Event) -> list[float]:
    values: Sequence[float] = ()
    if isinstance(event, Finished):
        values = event.hypotheses[0].log_probabilities
    elif isinstance(event, Encoded):
        values = (*event.probabilities, *event.vector)
    if len(values) != len(answer.values):  # it failed, for its scores were no numbers
        return [math.inf]
    return [abs(found - known) for found, known in zip(values, answer.values, strict=True)]
