"""The curve of a sweep: what waiting costs, and what the server delivers, over the rate that it is offered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from .ledger import Percentiles, Summary
from .report import Circumstances

BLUE, ORANGE, GREEN, RED, GREY = "#2563a8", "#d97706", "#15803d", "#b91c1c", "#6b7280"
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.labelcolor": "#374151",
    "axes.grid": True,
    "grid.color": "#e5e7eb",
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
    "savefig.dpi": 160,
}


def draw(circumstances: Circumstances, stages: Sequence[Summary], path: Path) -> None:
    """Writes the curve as a PNG."""
    stages = sorted(stages, key=lambda stage: stage.offered)
    with pyplot.rc_context(STYLE):
        figure, (above, below) = pyplot.subplots(2, 1, figsize=(9, 8), sharex=True, height_ratios=[3, 2], layout="constrained")
        _draw_latency(above, circumstances, stages)
        _draw_throughput(below, stages)
        for axes in (above, below):
            if circumstances.capacity is not None:
                axes.axvline(circumstances.capacity, color=GREY, linewidth=1, linestyle=(0, (1, 2)))
            axes.set_xlim(0, 1.04 * max(stage.offered for stage in stages))
        if circumstances.capacity is not None:
            above.annotate(
                "capacity (probe)",
                (circumstances.capacity, 1),
                xycoords=("data", "axes fraction"),
                xytext=(-4, -4),
                textcoords="offset points",
                ha="right",
                va="top",
                rotation=90,
                color=GREY,
                fontsize=8,
            )
        figure.suptitle("Latency and throughput under Poisson load", fontsize=13, fontweight="bold", x=0.012, ha="left")
        above.set_title(f"{circumstances.model}\n{circumstances.machine}", fontsize=8.5, color=GREY, loc="left")
        figure.savefig(path)
        pyplot.close(figure)


def _draw_latency(axes: Axes, circumstances: Circumstances, stages: Sequence[Summary]) -> None:
    _band(axes, stages, [stage.end_to_end for stage in stages], BLUE, "end to end")
    _band(axes, stages, [stage.first_token for stage in stages], ORANGE, "first token")
    gaps = [(stage.offered, 1e3 * stage.inter_token.p99) for stage in stages if stage.inter_token]
    if gaps:
        axes.plot(*zip(*gaps, strict=True), color=GREEN, linewidth=1.2, linestyle=":", marker=".", label="between tokens, p99")
    slo = 1e3 * circumstances.slo.end_to_end
    axes.axhline(slo, color=RED, linewidth=0.8, linestyle=(0, (6, 3)), label=f"bound on the answer, {slo:,g} ms")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_ylabel("ms from the planned send time (thin line: p90)")
    axes.legend(loc="upper left", fontsize=8.5, ncols=2)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * 4)  # room for the legend above the curves


def _band(axes: Axes, stages: Sequence[Summary], values: Sequence[Percentiles | None], colour: str, name: str) -> None:
    """p50 as a line, up to p99 as a band."""
    points = [(stage.offered, value) for stage, value in zip(stages, values, strict=True) if value]
    if not points:
        return
    offered = [x for x, _ in points]
    p50, p90, p99 = ([1e3 * getattr(value, name) for _, value in points] for name in ("p50", "p90", "p99"))
    axes.fill_between(offered, p50, p99, color=colour, alpha=0.13, linewidth=0)
    axes.plot(offered, p50, color=colour, linewidth=2, marker="o", markersize=4, label=f"{name}, p50")
    axes.plot(offered, p90, color=colour, linewidth=0.9, alpha=0.7)
    axes.plot(offered, p99, color=colour, linewidth=1.4, linestyle="--", marker="o", markersize=3, label=f"{name}, p99")


def _draw_throughput(axes: Axes, stages: Sequence[Summary]) -> None:
    offered = [stage.offered for stage in stages]
    failed = [sum(stage.errors.values()) / stage.elapsed for stage in stages]
    axes.plot([0, max(offered)], [0, max(offered)], color=GREY, linewidth=1, linestyle=(0, (1, 2)), label="offered")
    axes.plot(offered, [stage.served for stage in stages], color=BLUE, linewidth=4, alpha=0.45, label="served")
    axes.plot(
        offered, [stage.goodput for stage in stages], color=GREEN, linewidth=2, marker="o", markersize=4, label="within bounds"
    )
    if any(failed):
        axes.fill_between(offered, failed, color=RED, alpha=0.25, linewidth=0, label="failed")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("offered rate, requests/s")
    axes.set_ylabel("requests/s")
    axes.legend(loc="upper left", fontsize=8.5)
