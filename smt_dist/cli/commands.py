"""Start the programs: the console commands ``smt-*`` of an installed package."""

from __future__ import annotations

import sys

from smt_dist.cli.benchmarks import run_benchmark
from smt_dist.cli.program import run_program

# Each program is imported where it is started: one that plans or evaluates doesn't wait for the trainer.


def train() -> None:
    """Run ``smt-train``."""
    from smt_dist.cli.train import main

    run_program(main)


def select() -> None:
    """Run ``smt-select``."""
    from smt_dist.cli.select import main

    run_program(main)


def merge() -> None:
    """Run ``smt-merge``."""
    from smt_dist.cli.merge import main

    run_program(main)


def evaluate() -> None:
    """Run ``smt-evaluate``."""
    from smt_dist.cli.evaluate import main

    run_program(main)


def plan() -> None:
    """Run ``smt-plan``."""
    from smt_dist.cli.plan import main

    run_program(main)


def compare() -> None:
    """Run ``smt-compare``, which only a checkout has."""
    run_program(lambda: run_benchmark("compare", sys.argv[1:]))
