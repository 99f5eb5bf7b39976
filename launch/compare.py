"""Name the new place of a program, for one version."""

import sys

print("launch/compare.py is now launch/benchmarks/compare.py", file=sys.stderr)
sys.exit(2)
