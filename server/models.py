"""The models a server holds, found by the name a caller writes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum

from model.tokenizer import Tokenizer
from server.config import ConfigError
from server.engines.engine_client import EngineClient
from server.requests import GenerationDefaults, Limits


class Ability(Enum):
    """What a call asks of a model, as words of the sentence "this model cannot …"."""

    GENERATE = "generate text"
    SCORE = "score a target"
    CLASSIFY = "classify"
    EMBED = "embed"


class ModelNotFound(LookupError):
    """No model of this name, or none named where there are several."""


class WrongFamily(ValueError):
    """A call that this kind of model cannot answer, whatever its inputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """One model, loaded: everything the service needs to answer for it."""

    name: str
    family: str
    """"encoder_decoder", "decoder_only" or "encoder_only"."""
    task: str
    precision: str
    device: str
    fingerprint: str
    parameters: int
    limits: Limits
    defaults: GenerationDefaults
    labels: tuple[str, ...]
    certificate: str
    """The bundle's parity certificate, as JSON."""
    vocab_size: int
    shortlist: frozenset[int] | None = None
    """The only tokens that outputs may contain; None: all of the vocabulary."""
    can_align: bool = False
    """Whether the bundle has the graph that finds where the decoder looked."""
    tokenizer: Tokenizer
    engine: EngineClient

    @property
    def writable(self) -> Collection[int]:
        """The tokens that outputs may contain."""
        return range(self.vocab_size) if self.shortlist is None else self.shortlist

    @property
    def abilities(self) -> frozenset[Ability]:
        if self.family == "encoder_only":
            return frozenset({Ability.EMBED, Ability.CLASSIFY} if self.labels else {Ability.EMBED})
        return frozenset({Ability.GENERATE, Ability.SCORE})

    def require(self, ability: Ability) -> None:
        """Raises WrongFamily when the model lacks the ability."""
        if ability not in self.abilities:
            raise WrongFamily(f"{self.name!r} ({self.family}) cannot {ability.value}")


class Models:
    """The models of one server, in the order in which it was given them.

    Raises:
        ConfigError: for no model at all, or two of one name.
    """

    def __init__(self, models: Iterable[ServedModel]) -> None:
        self._by_name: dict[str, ServedModel] = {}
        for model in models:
            if model.name in self._by_name:
                raise ConfigError([f"two models are named {model.name!r}"])
            self._by_name[model.name] = model
        if not self._by_name:
            raise ConfigError(["a server needs at least one model"])

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._by_name.values())

    def find(self, name: str) -> ServedModel:
        """The model of this name; an empty name stands for the only one.

        Raises:
            ModelNotFound: for a name that no model has, or none where there are several.
        """
        loaded = ", ".join(self._by_name)
        if not name and len(self._by_name) > 1:
            raise ModelNotFound(f"must be named, because this server has several: {loaded}")
        model = self._by_name.get(name) if name else next(iter(self))
        if model is None:
            raise ModelNotFound(f"{_shown(name)} is not loaded; this server has: {loaded}")
        return model


def _shown(name: str) -> str:
    """A stranger's text, fit for an error message: short and printable."""
    return ascii(name if len(name) <= 40 else f"{name[:40]}…")
