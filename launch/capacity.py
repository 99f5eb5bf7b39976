"""Name the new place of a program, for one version."""

import sys

print("launch/capacity.py is now launch/benchmarks/capacity.py", file=sys.stderr)
sys.exit(2)
