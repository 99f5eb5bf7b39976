"""Score a model on questions: the command ``smt-evaluate``, for launchers that take a path."""

from smt_dist.cli.evaluate import main
from smt_dist.cli.program import run_program

if __name__ == "__main__":
    run_program(main)
