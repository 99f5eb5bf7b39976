"""Fault tolerance: lost ranks, signals, ranks that differ, non-finite numbers. Knows of SMT only its blocks."""
