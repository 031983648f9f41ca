"""The curve of a soak: memory over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib import pyplot

from tests.load.plot import BLUE, GREY, ORANGE, STYLE
from tests.load.soak import Sample


def draw(samples: Sequence[Sample], path: Path) -> None:
    """Writes the curve as a PNG; each process from its smallest on, so that growth shows."""
    minutes = [sample.seconds / 60 for sample in samples]
    with pyplot.rc_context(STYLE):
        figure, (memory, counts) = pyplot.subplots(2, 1, figsize=(9, 6), sharex=True, layout="constrained")
        for name, values, color in (
            ("front end", [sample.front_end.memory for sample in samples], BLUE),
            ("engine", [sample.engine_memory for sample in samples], ORANGE),
        ):
            least = min(values)
            memory.plot(minutes, [(value - least) / 2**20 for value in values], color=color, label=name)
            memory.annotate(
                f"{least / 2**20:.0f} MiB + …", (minutes[-1], (values[-1] - least) / 2**20), color=color, fontsize=8
            )
        memory.set_ylabel("memory above its least, MiB")
        memory.legend(loc="upper left")
        counts.plot(minutes, [sample.front_end.descriptors for sample in samples], color=GREY, label="descriptors")
        counts.plot(minutes, [sample.front_end.tasks for sample in samples], color=BLUE, label="tasks")
        counts.set_xlabel("minutes")
        counts.legend(loc="upper left")
        figure.suptitle("Soak", fontsize=13, fontweight="bold", x=0.012, ha="left")
        figure.savefig(path)
        pyplot.close(figure)
