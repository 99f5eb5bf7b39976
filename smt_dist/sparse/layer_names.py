"""Find a module's layer by its name."""

from __future__ import annotations


def layer_key(module: str) -> str:
    """Return the name up to its first number, or the whole name if it has none.

    Example: ``model.layers.3`` of ``model.layers.3.self_attn.q_proj``.
    """
    parts = module.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return module
