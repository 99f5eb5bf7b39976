"""Merge an adapter into its base: the command ``smt-merge``, for launchers that take a path."""

from smt_dist.cli.merge import main
from smt_dist.cli.program import run_program

if __name__ == "__main__":
    run_program(main)
