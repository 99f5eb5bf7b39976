"""Moved: names the new place, for one version."""

raise SystemExit("launch/capacity.py is now launch/benchmarks/capacity.py")
