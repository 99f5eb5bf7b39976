"""Find the benchmarks, where this package runs from a checkout.

They measure the project and aren't shipped.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from smt_dist.errors import SMTError

FOLDER = Path(__file__).resolve().parents[2] / "launch" / "benchmarks"


def run_benchmark(name: str, words: list[str]) -> None:
    """Run the program ``launch/benchmarks/<name>.py`` with the command line ``words``.

    Raises:
        SMTError: this installation has no benchmarks; says where they are.
    """
    if not (FOLDER / f"{name}.py").is_file():
        raise SMTError(
            f"the benchmarks aren't part of the wheel: clone the repository, install it with pip install -e ., and run "
            f"python launch/benchmarks/{name}.py there"
        )
    # They are started by path, so they find one another in their own folder.
    if str(FOLDER) not in sys.path:
        sys.path.insert(0, str(FOLDER))
    sys.argv[1:] = words
    importlib.import_module(name).main()
