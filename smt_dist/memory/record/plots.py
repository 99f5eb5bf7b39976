"""Plot a recording as PNG.

matplotlib (the extra ``plots``) is imported where it is used.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from smt_dist.errors import SMTError
from smt_dist.memory.plan.categories import CATEGORIES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIB = 2**20
# One colour a category, the same in all plots.
COLORS = dict(
    zip(
        CATEGORIES,
        ("#4e79a7", "#a0cbe8", "#59a14f", "#f28e2b", "#8cd17d", "#e15759", "#b07aa1", "#bab0ac", "#edc948"),
        strict=True,
    )
)


def require_matplotlib(flag: str) -> None:
    """Raise SMTError, naming the flag, where it isn't installed."""
    if find_spec("matplotlib") is None:
        raise SMTError(f'{flag}: matplotlib is not installed; pip install "smt_dist[plots]"')


def plot_timeline(recording: Mapping[str, Any]) -> bytes:
    """Plot what a rank held, stretch by stretch.

    Args:
        recording: :meth:`Recording.to_json`.
    """
    from matplotlib.figure import Figure

    timelines = recording["timelines"]
    figure = Figure(figsize=(4 + 3 * len(timelines), 4), layout="constrained")
    axes = figure.subplots(1, max(1, len(timelines)), sharey=True, squeeze=False)[0]
    for axis, timeline in zip(axes, timelines, strict=False):
        _stack(axis, timeline)
    axes[0].set_ylabel("MiB")
    _legend(figure, axes[0])
    figure.suptitle(f"rank {recording['rank']}, {recording['device']}")
    return _png(figure)


def plot_peaks(planned: Mapping[str, Any], measured: Mapping[str, Any]) -> bytes:
    """Plot each phase's peak by category, as planned and beside it as measured.

    Args:
        planned: phase -> bytes by category; phases may lack.
        measured: the same.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 + 1.5 * len(measured), 4), layout="constrained")
    axis = figure.subplots()
    for place, phase in enumerate(measured):
        for offset, values in ((-0.2, planned.get(phase)), (0.2, measured[phase])):
            bottom = 0.0
            for name in CATEGORIES if values else ():
                size = values[name] / MIB
                axis.bar(place + offset, size, width=0.36, bottom=bottom, color=COLORS[name], label=name)
                bottom += size
    axis.set_xticks(range(len(measured)), [f"{phase}\nplan | run" for phase in measured])
    axis.set_ylabel("MiB")
    _legend(figure, axis)
    return _png(figure)


def _stack(axis: Axes, timeline: Mapping[str, Any]) -> None:
    seconds = np.array(timeline["seconds"])
    held = [np.array(timeline["bytes"][name]) / MIB for name in CATEGORIES]
    axis.stackplot(seconds, *held, labels=CATEGORIES, colors=[COLORS[name] for name in CATEGORIES], step="post")
    axis.set_xlabel("seconds")
    phase = None
    for mark in timeline["marks"]:
        if mark["phase"] != phase:
            phase = mark["phase"]
            axis.axvline(mark["seconds"], color="black", linewidth=0.6)
            place = (mark["seconds"], 1.0)
            axis.annotate(phase, place, xycoords=("data", "axes fraction"), rotation=90, va="top", fontsize=8)


def _legend(figure: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    names = [label.replace("_", " ") for label in unique]
    figure.legend(unique.values(), names, loc="outside right upper", fontsize=8)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
