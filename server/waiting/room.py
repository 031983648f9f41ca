"""What the service asks of the place where requests wait for their turn, wherever that is."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Protocol

from server.engines.engine_client import EngineClient
from server.engines.stepper import Request


class Room(EngineClient, Protocol):
    """An ``EngineClient`` that may refuse calls."""

    def check(self) -> None:
        """Refuses the running call if it would be refused however small it is, before any work is done for it.

        Raises:
            server.waiting.admission.Refused: with a time to come back.
        """

    def admit(self, requests: Sequence[Request]) -> AbstractContextManager[None]:
        """Until the running call has handed its requests over, which is the end of the block.

        Raises:
            server.waiting.admission.Refused: on entering; or each request ends as ``Failure.OVERLOADED`` once handed over.
        """
