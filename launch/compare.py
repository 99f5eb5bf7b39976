"""Moved: names the new place, for one version."""

raise SystemExit("launch/compare.py is now launch/benchmarks/compare.py")
