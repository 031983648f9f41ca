"""The client other services install: typed, with deadlines, retries and load balancing set up. Needs only stubs and grpcio.

async with TransformerClient("dns:///transformer:50051") as client:
    (result,) = await client.generate(["3. März 2026"])
    print(result.text)
"""

from server.client.asynchronous import TransformerClient
from server.client.errors import CallError, FieldViolation
from server.client.synchronous import SyncTransformerClient
from server.client.types import (
    Attention,
    Classification,
    ClassProbability,
    Embedding,
    Generation,
    Hypothesis,
    ModelInfo,
    ModelLimits,
    Options,
    Sampling,
    Score,
    StreamedGeneration,
    StreamedText,
    Token,
    Tokenization,
)

__all__ = [
    "Attention",
    "CallError",
    "ClassProbability",
    "Classification",
    "Embedding",
    "FieldViolation",
    "Generation",
    "Hypothesis",
    "ModelInfo",
    "ModelLimits",
    "Options",
    "Sampling",
    "Score",
    "StreamedGeneration",
    "StreamedText",
    "SyncTransformerClient",
    "Token",
    "Tokenization",
    "TransformerClient",
]
