"""Moved: names the new place, for one version."""

raise SystemExit(
    "launch/benchmark.py is now launch/benchmarks/step.py (--communication: launch/benchmarks/communication.py)"
)
