"""The quickstart's last lines: accuracies on the same tasks, and a difference that says how sure it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from programs import load_program

PROGRAM = Path(__file__).parents[1] / "launch" / "report_quickstart.py"


@pytest.fixture(scope="module")
def report():
    return load_program("report_quickstart.py")


def result(style: str, *answers: tuple[str, list[bool]]) -> dict:
    """What evaluate_model.py writes, as far as it is read here."""
    (counted,) = [rights for name, rights in answers if name == style]
    results = [
        {"prompt_style": name, "predictions": [{"correct": right} for right in rights]} for name, rights in answers
    ]
    share = sum(counted) / len(counted)
    return {"prompt_style": style, "accuracy": share, "n": len(counted), "results": results}


@pytest.mark.parametrize(
    ("won", "lost", "same", "low", "high"),
    [
        (40, 5, 83, 0.1780, 0.3604),  # worked out by hand: (40.5 - 5.5) / 130, plus and minus 1.96 deviations
        (0, 0, 16, -0.1089, 0.1089),  # no task changed, which doesn't make it certain
        (2, 0, 0, -0.1930, 1.0),  # never beyond all tasks
    ],
)
def test_interval_of_the_difference(report, won, lost, same, low, high):
    before = [False] * won + [True] * lost + [True] * same
    after = [True] * won + [False] * lost + [True] * same
    assert report.difference_interval(before, after) == pytest.approx((low, high), abs=1e-4)


def test_the_style_that_counts_is_compared(tmp_path):
    before = result("chat", ("plain", [True, False, False, False]), ("chat", [False, True, True, False]))
    after = result("chat", ("chat", [True, True, True, False]))
    for name, content in (("before", before), ("after", after)):
        (tmp_path / name).write_text(json.dumps(content))
    command = [sys.executable, PROGRAM, "--before", tmp_path / "before", "--after", tmp_path / "after"]
    line = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "4 held-out tasks: 50.0% before (chat prompt), 75.0% after: +25.0 points (95 % interval: " in line
