"""Name the new place of a program, for one version."""

import sys

print(
    "launch/benchmark.py is now launch/benchmarks/step.py (--communication: launch/benchmarks/communication.py)",
    file=sys.stderr,
)
sys.exit(2)
