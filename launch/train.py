"""Fine-tune with SMT: the command ``smt-train``, for launchers that take a path."""

from smt_dist.cli.program import run_program
from smt_dist.cli.train import main

if __name__ == "__main__":
    run_program(main)
