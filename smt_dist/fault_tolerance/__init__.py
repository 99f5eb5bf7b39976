"""Detect lost ranks, signals, replica divergence and non-finite numbers.

Of SMT this room uses only the blocks to compare.
"""
