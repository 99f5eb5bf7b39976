"""Plan memory before a launch: the command ``smt-plan``, for launchers that take a path."""

from smt_dist.cli.plan import main
from smt_dist.cli.program import run_program

if __name__ == "__main__":
    run_program(main)
