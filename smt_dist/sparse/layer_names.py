"""Layers by their modules' names."""

from __future__ import annotations


def layer_key(module: str) -> str:
    """The name up to its first number: ``model.layers.3`` of ``model.layers.3.self_attn.q_proj``."""
    parts = module.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return module
