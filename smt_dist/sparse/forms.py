"""Choose the form of each layer's blocks: inside the base's weight, or beside it."""

from __future__ import annotations

from typing import Literal

from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from smt_dist.errors import SMTError
from smt_dist.sparse.embedding import SparseEmbedding
from smt_dist.sparse.in_place import InPlaceEmbedding, InPlaceLinear
from smt_dist.sparse.layer import SparseLayer
from smt_dist.sparse.linear import SparseLinear
from smt_dist.sparse.targets import is_embedding, tied_parameter_names

Form = Literal["in_place", "additive"]


def layer_kind(model: nn.Module, name: str, wanted: str, auto_form: Form) -> type[SparseLayer]:
    """Choose the class of a module's sparse layer.

    Args:
        model: that has the module.
        name: the module's.
        wanted: the config's ``form``.
        auto_form: what ``"auto"`` means wherever the weight allows it.

    Raises:
        SMTError: ``in_place`` is wanted where the weight doesn't allow it; says why and what would work.
    """
    module = model.get_submodule(name)
    form: str = auto_form if wanted == "auto" else wanted
    if form == "in_place" and (reason := why_additive(model, name)) is not None:
        if wanted == "in_place":
            raise SMTError(f'smt config form in_place: {name} {reason}; use "auto", which keeps its blocks beside it')
        form = "additive"
    if form == "in_place":
        return InPlaceEmbedding if is_embedding(module) else InPlaceLinear
    return SparseEmbedding if is_embedding(module) else SparseLinear


def why_additive(model: nn.Module, name: str) -> str | None:
    """Return why a module's weight can't hold blocks, to follow its name, or None if it can."""
    module = model.get_submodule(name)
    weight = module.weight
    if hasattr(weight, "ds_id"):
        return "has a weight that ZeRO-3 partitions"
    if not weight.is_floating_point():
        return f"has a quantised weight ({weight.dtype})"
    if isinstance(weight, DTensor) and not _is_cut_by_rows(weight):
        return f"has a weight that is sharded over its columns {weight.placements}"
    if others := tied_parameter_names(model, name):
        size = weight.numel() * weight.element_size()
        return f"is tied to {others[0]}, which its blocks would change too (a copy would take {size:,} bytes)"
    return None


def _is_cut_by_rows(weight: DTensor) -> bool:
    shards = [placement for placement in weight.placements if not isinstance(placement, Replicate)]
    return len(shards) <= 1 and all(isinstance(one, Shard) and one.dim == 0 for one in shards)


def describe_forms(layers: dict[str, SparseLayer], model: nn.Module) -> str:
    """Describe in one line which form the layers have, and why some aren't in place."""
    beside = {name: layer for name, layer in layers.items() if not layer.is_in_place}
    inside = len(layers) - len(beside)
    if not beside:
        return f"blocks lie inside their weights in all {inside} modules"
    first = next(iter(beside))
    reason = why_additive(model, first) if inside else None
    why = "" if reason is None else f" ({first} {reason})"
    return f"blocks lie inside their weights in {inside} modules, beside them in {len(beside)}{why}"
