"""The pictures of a run: its curves from log.jsonl, and one sentence's cross-attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from model.files import write_atomically

_BLUE, _ORANGE, _GREY = "#2f5d8c", "#d1642e", "#8a8f98"
_POINTS = 400
"""A curve of more updates is drawn as the means of this many stretches."""

Entries = Sequence[dict[str, Any]]


def draw_curves(entries: Entries, metric: str, folder: Path) -> dict[str, Path]:
    """Pictures of what a log holds, by name.

    Args:
        metric: the name under which evaluations hold the task's metric.
    """
    folder.mkdir(exist_ok=True)
    pictures = {"loss": _draw(folder / "loss.png", lambda axes: _loss(axes, entries))}
    if any(metric in entry for entry in entries):
        pictures["metric"] = _draw(folder / "metric.png", lambda axes: _metric(axes, entries, metric))
    pictures["learning rate"] = _draw(folder / "learning_rate.png", lambda axes: _learning_rate(axes, entries))
    pictures["gradient norm"] = _draw(folder / "gradient_norm.png", lambda axes: _gradient_norm(axes, entries))
    return pictures


def draw_attention(weights: Tensor, source: Sequence[str], target: Sequence[str], picture: Path) -> Path:
    """A heat map of [T, S]: what is written from top to bottom, what was read from left to right."""

    def heat_map(axes: Any) -> None:
        image = axes.imshow(weights.numpy(), cmap="Blues", vmin=0.0, vmax=max(0.5, float(weights.max())), aspect="auto")
        axes.set_xticks(
            range(len(source)), [_shown(token) for token in source], rotation=45, ha="right", rotation_mode="anchor"
        )
        axes.set_yticks(range(len(target)), [_shown(token) for token in target])
        axes.set(xlabel="source", ylabel="output")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.grid(visible=False)
        axes.set_xticks([i - 0.5 for i in range(1, len(source))], minor=True)
        axes.set_yticks([i - 0.5 for i in range(1, len(target))], minor=True)
        axes.grid(which="minor", color="white", linewidth=1.5)
        axes.tick_params(which="minor", length=0)
        axes.figure.colorbar(image, ax=axes, label="weight, mean over heads", fraction=0.04, pad=0.02).outline.set_visible(
            False
        )

    picture.parent.mkdir(exist_ok=True)
    return _draw(picture, heat_map, (2.6 + 0.42 * len(source), 1.6 + 0.3 * len(target)))


def _loss(axes: Any, entries: Entries) -> None:
    updates, losses = _series(entries, "loss")
    training = _means(updates, losses)[1]
    axes.plot(*_means(updates, losses), color=_BLUE, linewidth=1.6, label="training (as it is minimised)")
    updates, losses = _series(entries, "validation_loss")
    lowest, settled = min([*training, *losses]), max([*training[len(training) // 30 :], *losses[:1]])
    if losses:
        best = min(range(len(losses)), key=losses.__getitem__)
        axes.plot(updates, losses, color=_ORANGE, linewidth=1.6, marker=".", markersize=4, label="validation")
        _point(axes, updates[best], losses[best], f"best {losses[best]:.3f}", below=True)
    room = 0.12 * (settled - lowest) or 0.1
    axes.set(ylabel="loss (nats a label)", ylim=(lowest - room, settled + room))  # the first plunge would squeeze the rest
    axes.legend(frameon=False)


def _metric(axes: Any, entries: Entries, metric: str) -> None:
    updates, values = _series(entries, metric)
    lower_is_better = metric == "perplexity"
    best = (min if lower_is_better else max)(range(len(values)), key=values.__getitem__)
    axes.plot(updates, values, color=_ORANGE, linewidth=1.6, marker=".", markersize=4)
    _point(axes, updates[best], values[best], f"best {values[best]:.2f}", below=lower_is_better)
    axes.set(ylabel=metric.replace("_", " ") + " (validation)")
    if lower_is_better and max(values) > 20 * min(values):
        _log_scale(axes)


def _learning_rate(axes: Any, entries: Entries) -> None:
    axes.plot(*_series(entries, "learning_rate"), color=_BLUE, linewidth=1.6)
    axes.set(ylabel="learning rate")
    axes.ticklabel_format(axis="y", scilimits=(-2, 2))
    axes.set_ylim(bottom=0.0)


def _gradient_norm(axes: Any, entries: Entries) -> None:
    updates, norms = _series(entries, "gradient_norm")
    axes.plot(updates, norms, color=_GREY, linewidth=0.5, alpha=0.5, label="each update")
    axes.plot(*_means(updates, norms), color=_BLUE, linewidth=1.6, label="mean")
    axes.set(ylabel="gradient norm")
    _log_scale(axes)
    axes.legend(frameon=False)


def _log_scale(axes: Any) -> None:
    """With ticks that read as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _series(entries: Entries, key: str) -> tuple[list[float], list[float]]:
    pairs = [(entry["update"], entry[key]) for entry in entries if key in entry]
    return [update for update, _ in pairs], [value for _, value in pairs]


def _means(xs: list[float], ys: list[float]) -> tuple[list[float], list[float]]:
    """At most _POINTS points: each the mean of as many neighbours, at their middle."""
    size = -(-len(xs) // _POINTS) or 1
    groups = [slice(i, i + size) for i in range(0, len(xs), size)]
    return [sum(xs[g]) / len(xs[g]) for g in groups], [sum(ys[g]) / len(ys[g]) for g in groups]


def _point(axes: Any, x: float, y: float, text: str, *, below: bool) -> None:
    axes.plot([x], [y], "o", color=_ORANGE, markersize=6, markeredgecolor="white")
    left, right = axes.get_xlim()
    side = "right" if x > (left + right) / 2 else "left"
    axes.annotate(text, (x, y), (-6 if side == "right" else 6, -14 if below else 9), textcoords="offset points", ha=side,
                  color=_ORANGE, fontweight="bold")  # fmt: skip
    axes.margins(y=0.12)


def _shown(token: str) -> str:
    return token.replace("$", r"\$") or "·"


def _draw(picture: Path, fill: Callable[[Any], None], size: tuple[float, float] = (7.0, 3.6)) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    style: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25,
             "axes.edgecolor": _GREY, "axes.labelcolor": "#333", "xtick.color": "#333", "ytick.color": "#333"}  # fmt: skip
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(figsize=size, layout="constrained")
        axes.set(xlabel="update")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        fill(axes)
        write_atomically(picture, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
        pyplot.close(figure)
    return picture
