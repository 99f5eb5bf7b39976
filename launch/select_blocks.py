"""Choose the blocks only: the command ``smt-select``, for launchers that take a path."""

from smt_dist.cli.program import run_program
from smt_dist.cli.select import main

if __name__ == "__main__":
    run_program(main)
