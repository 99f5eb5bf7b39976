"""Write the report of a profiled run: JSON, plots, a page and a table.

The page needs no other file.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment

from smt_dist.memory.plan.categories import CATEGORIES, format_size
from smt_dist.memory.record.plots import plot_peaks, plot_timeline

JSON_FILE, PAGE, BARS = "memory.json", "memory.html", "plan_and_measured.png"


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Write all files.

    Args:
        folder: to write into; it exists.
        report: ``run`` (name -> what the run was), ``planned`` (phase -> moment and peak), ``no_plan`` (why there is
            none, or None) and ``ranks`` (:meth:`Recording.to_json` of each).
    """
    (folder / JSON_FILE).write_text(json.dumps(report) + "\n")
    planned = {phase: value["peak"] for phase, value in report["planned"].items()}
    plots = {BARS: plot_peaks(planned, {phase: rank["peak"] for phase, rank in fullest(report["ranks"]).items()})}
    plots |= {f"timeline_rank_{rank['rank']}.png": plot_timeline(rank) for rank in report["ranks"]}
    for name, content in plots.items():
        (folder / name).write_bytes(content)
    (folder / PAGE).write_text(render_page(report, plots))


def render_page(report: Mapping[str, Any], plots: Mapping[str, bytes]) -> str:
    """Render the page: plots are in it, text is escaped.

    Args:
        report: as for :func:`write_report`.
        plots: name -> PNG.
    """
    template = resources.files("smt_dist.memory.record").joinpath("report.html").read_text()
    images = {name: "data:image/png;base64," + base64.b64encode(png).decode() for name, png in plots.items()}
    return (
        Environment(autoescape=True)
        .from_string(template)
        .render(report=report, rows=comparison(report), images=images, format_size=format_size)
    )


def fullest(ranks: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return phase -> ``rank``, ``moment`` and ``peak`` of the rank that held most in it."""
    found: dict[str, dict[str, Any]] = {}
    for rank in ranks:
        for phase, value in rank["phases"].items():
            if phase not in found or value["peak"]["total"] > found[phase]["peak"]["total"]:
                found[phase] = {"rank": rank["rank"], **value}
    return found


def comparison(report: Mapping[str, Any]) -> list[list[str]]:
    """Return rows of text that compare plan and measurement.

    Categories are rows; each phase has a planned column and one measured on the fullest rank.
    """
    measured = fullest(report["ranks"])
    planned = {phase: value["peak"] for phase, value in report["planned"].items()}
    rows = [["", *(f"{phase}, {kind}" for phase in measured for kind in _kinds(phase, planned))]]
    for name in (*CATEGORIES, "total"):
        cells = []
        for phase, value in measured.items():
            cells += [planned[phase][name]] if phase in planned else []
            cells.append(value["peak"][name])
        if any(cells):
            rows.append([name.replace("_", " "), *(format_size(cell) if cell else "-" for cell in cells)])
    errors = []
    for phase, value in measured.items():
        total = value["peak"]["total"]
        errors += ["", f"{planned[phase]['total'] / total - 1:+.1%}"] if phase in planned else [""]
    return [*rows, ["plan's error", *errors]]


def table(report: Mapping[str, Any]) -> str:
    """Format each phase's planned and measured peak, and resident memory.

    With categories where both are known.
    """
    measured = fullest(report["ranks"])
    lines = [f"{'peak of the fullest rank':<26}{'planned':>12}{'measured':>12}{'error':>9}  measured at"]
    for phase, value in measured.items():
        total = value["peak"]["total"]
        planned = report["planned"].get(phase, {}).get("peak", {}).get("total")
        error = "" if planned is None else f"{planned / total - 1:+.1%}"
        size = "-" if planned is None else format_size(planned)
        moment = f"{value['moment']} (rank {value['rank']})"
        lines.append(f"{phase:<26}{size:>12}{format_size(total):>12}{error:>9}  {moment}")
    for phase in ("warmup", "training"):
        if phase in measured and phase in report["planned"]:
            lines.append(f"{phase}, by category")
            lines += _categories(report["planned"][phase]["peak"], measured[phase]["peak"])
    if report["no_plan"]:
        lines.append(f"no plan: {report['no_plan']}")
    if resident := max((max(rank["resident_bytes"].values(), default=0) for rank in report["ranks"]), default=0):
        lines.append(f"resident memory of a process, with the profiler's log: {format_size(resident)} at most")
    return "\n".join(lines)


def _categories(planned: Mapping[str, int], measured: Mapping[str, int]) -> list[str]:
    rows = [(name, planned[name], measured[name]) for name in CATEGORIES if planned[name] or measured[name]]
    return [f"  {name.replace('_', ' '):<24}{format_size(plan):>12}{format_size(run):>12}" for name, plan, run in rows]


def _kinds(phase: str, planned: Mapping[str, Any]) -> list[str]:
    return ["planned", "measured"] if phase in planned else ["measured"]
