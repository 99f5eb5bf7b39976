"""Print what `quickstart.sh` found: accuracy before and after on the same tasks, and how sure the difference is."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from smt_dist.cli.program import HelpFormatter, run_program


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="what evaluate_model.py wrote of the base")
    parser.add_argument("--after", type=Path, required=True, help="the same of the tuned model")
    arguments = parser.parse_args()
    print(describe(*(json.loads(path.read_text()) for path in (arguments.before, arguments.after))))


def describe(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Word two results of evaluate_model.py; each counts with the better of its prompt styles."""
    low, high = difference_interval(answers(before), answers(after))
    gain = after["accuracy"] - before["accuracy"]
    return (
        f"exact match on {after['n']} held-out tasks: {before['accuracy']:.1%} before "
        f"({before['prompt_style']} prompt), {after['accuracy']:.1%} after: {100 * gain:+.1f} points "
        f"(95 % interval: {100 * low:+.1f} to {100 * high:+.1f})"
    )


def answers(result: dict[str, Any]) -> list[bool]:
    """List whether each task's answer was right, in the prompt style that counts."""
    (counted,) = [style for style in result["results"] if style["prompt_style"] == result["prompt_style"]]
    return [prediction["correct"] for prediction in counted["predictions"]]


def difference_interval(before: list[bool], after: list[bool]) -> tuple[float, float]:
    """Bound the difference of two shares of right answers to the same tasks, at 95 %.

    Agresti and Min's interval: half a task is added to each of the four outcomes (right or wrong, before and after).
    """
    pairs = list(zip(before, after, strict=True))
    won, lost = pairs.count((False, True)) + 0.5, pairs.count((True, False)) + 0.5
    tasks = len(pairs) + 2
    middle = (won - lost) / tasks
    margin = 1.96 * math.sqrt(won + lost - (won - lost) ** 2 / tasks) / tasks
    return max(-1.0, middle - margin), min(1.0, middle + margin)


if __name__ == "__main__":
    run_program(main)
