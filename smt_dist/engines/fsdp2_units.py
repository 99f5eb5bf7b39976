"""Choose what FSDP2 gathers at once: whole decoder layers, or single linear weights.

A layer that is gathered lies in memory twice for a moment: in the buffer of the all-gather and as weights. Where layers
are large beside a rank's share of the base, that is most of the peak. Gathering weight by weight needs a fraction of
it, at the price of more and smaller collectives.
"""

from __future__ import annotations

import re
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from smt_dist.sparse.targets import may_be_idle

Units = Literal["auto", "layer", "weight"]
UNITS: tuple[Units, ...] = get_args(Units)
FREE = "free_full_weight"
# From this size on a layer is cut up by "auto", in bytes of its gathered weights.
LARGE_LAYER = 2**28


def sharding_plan(config: PreTrainedConfig, dtype: torch.dtype, units: str) -> dict[str, str]:
    """Return the changes to transformers' own sharding plan.

    They are for ``DistributedConfig(fsdp_plan=...)``.

    Args:
        config: the model's.
        dtype: of its weights.
        units: ``layer``: transformers' plan but for the head, which is given back after use (with a chunked loss it
            is never gathered at all). ``weight``: each linear weight of a layer as well, but for experts. ``auto``:
            by weight where a layer has at least 256 MiB.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return {}  # a model of its own code: transformers' plan
    with torch.device("meta"):
        model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    names = {module: name for name, module in model.named_modules()}
    plan = {}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head in names and embedding is not None and head.weight is not embedding.weight:
        plan[names[head]] = FREE
    layered = {name: module for module, name in names.items() if _wildcard(name) != name}
    # Experts stay in their layer's unit: a rank whose tokens don't reach one would leave the others waiting for it.
    linear = {_wildcard(n): m for n, m in layered.items() if isinstance(m, nn.Linear) and not may_be_idle(n)}
    largest = max((_elements(m) for n, m in layered.items() if re.fullmatch(r".*\.\d+", n)), default=0)
    if units == "weight" or (units == "auto" and largest * dtype.itemsize >= LARGE_LAYER):
        plan |= dict.fromkeys(linear, FREE)
    return plan


def _wildcard(name: str) -> str:
    """Return a module's name as transformers' plans write it.

    ``model.layers.*.mlp.up_proj`` for ``model.layers.3.mlp.up_proj``.
    """
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def release_early(model: nn.Module, prefetch: bool) -> None:
    """Keep few units gathered at once.

    Args:
        model: sharded by FSDP2. Weights that are units of their own are given back after a recomputation too.
        prefetch: let FSDP2 gather the next unit of the backward while one computes.
    """
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        if not prefetch:
            # FSDP2 prefetches the next unit unless a unit is named; this one is gathered already.
            module.set_modules_to_backward_prefetch([module])
        if isinstance(module, nn.Linear):
            _Releaser(module)


class _Releaser:
    """Reshard a unit's weight after a recomputation.

    FSDP2 leaves it gathered, for the backward comes soon; but that of a layer's first weights comes after those of all
    the others. A unit whose backward has begun keeps its weight.
    """

    def __init__(self, unit: FSDPModule) -> None:
        self._backward_began = False
        unit.register_forward_hook(self._after_forward)

    def _after_forward(self, unit: FSDPModule, _args: tuple, output: Any) -> None:
        if not in_backward():
            self._backward_began = False
            if output.requires_grad:
                output.register_hook(self._begin_backward)
        elif not self._backward_began:
            unit.reshard()

    def _begin_backward(self, _gradient: torch.Tensor) -> None:
        self._backward_began = True


def in_backward() -> bool:
    """Return whether autograd is running a backward, so that a forward is a recomputation.

    FSDP2 asks the same way; torch has no public one (checked on 2.13.0).
    """
    return torch._C._current_graph_task_id() != -1
