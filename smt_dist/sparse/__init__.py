"""Sparse: what a block is, and a model that carries blocks."""
