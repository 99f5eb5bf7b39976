"""Choose which layers save their whole input instead of copies of columns.

They save it for the backward, by reference.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from smt_dist.sparse.layer import SparseLayer
from smt_dist.sparse.linear import SparseLinear

# Modules of one parent that read the same tensor. A family that is missing here costs memory, nothing else.
FAMILIES = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)


def choose_kept_inputs(layers: Mapping[str, SparseLayer]) -> None:
    """Let layers that share an input save it whole where their copies would take as much.

    Args:
        layers: module name -> layer; those that aren't linear keep no columns.
    """
    readers: dict[tuple[str, str, int], list[SparseLinear]] = defaultdict(list)
    for name, layer in layers.items():
        if isinstance(layer, SparseLinear):
            parent, _, leaf = name.rpartition(".")
            family = next((family[0] for family in FAMILIES if leaf in family), leaf)
            readers[parent, family, layer.grid.cols].append(layer)
    for (_, _, width), group in readers.items():
        copied = sum(layer.copied_columns for layer in group)
        for layer in group:
            layer.keep_whole_input(copied >= width)
