"""Steps a few odd-sized parameters with ShardedBlockOptimizer, and what one process would do with all gradients."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from smt_dist.distributed import barrier, get_rank, get_world_size
from smt_dist.engines.elementwise import optimizer_class_by_name
from smt_dist.engines.replicated import ReplicatedBlocks
from smt_dist.engines.sharded_optimizer import ShardedBlockOptimizer, release_gradients

# 7 + 15 elements in one group, 1 in the other: neither ranks' slices nor groups end where parameters do.
SHAPES = [[(7, 1), (3, 5)], [(1, 1)]]
GROUPS = [{"lr": 0.1, "weight_decay": 0.0}, {"lr": 0.03, "weight_decay": 0.1}]
STEPS, ACCUMULATION, RANKS = 4, 2, 4
MAX_NORM = 1.5
Case = dict[str, Any]


def run_cases(_folder: Path, cases: dict[str, Case]) -> dict[str, Any]:
    """Case name -> findings. A case: ``optimizer``, ``options``, ``dtype``, ``reduce_dtype``, ``told``."""
    found = {name: _train(**case) for name, case in cases.items()}
    return found | {
        "moved to a new optimizer": _moved(),
        "state_dict": _state_dict(),
        "scaled": _clipped_to_nothing(),
        "idle": {name: _reductions_in_a_backward(told) for name, told in (("told", True), ("not told", False))},
    }


def make_groups(dtype: torch.dtype) -> list[dict[str, Any]]:
    """Fresh parameters, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    return [
        {"params": [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes], **options}
        for shapes, options in zip(SHAPES, GROUPS, strict=True)
    ]


def gradients_of(step: int, micro_batch: int, rank: int) -> list[torch.Tensor]:
    """What ``rank`` of :data:`RANKS` finds in a micro-batch; a coarse grid, so that sums are exact in any order."""
    generator = torch.Generator().manual_seed(1000 * step + 10 * micro_batch + rank)
    return [
        torch.randint(-64, 65, shape, generator=generator) / 32.0 * (1 + step) for shapes in SHAPES for shape in shapes
    ]


def backward(groups: list[dict[str, Any]], gradients: list[torch.Tensor]) -> None:
    """A backward that gives the parameters these gradients."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    sum((p * g.to(p.dtype)).sum() for p, g in zip(parameters, gradients, strict=True)).backward()


def own_ranks() -> list[int]:
    """Which of the :data:`RANKS` shares of the data this process works off."""
    share = RANKS // get_world_size()
    return list(range(get_rank() * share, (get_rank() + 1) * share))


def _train(
    optimizer: str, options: dict[str, Any], dtype: str, reduce_dtype: str, told: int | None = None
) -> dict[str, Any]:
    groups = make_groups(getattr(torch, dtype))
    inner = optimizer_class_by_name(optimizer)
    told = told and told * len(own_ranks())
    sharded = ShardedBlockOptimizer(groups, inner, options, getattr(torch, reduce_dtype), told)
    norms, held = [], []
    for step in range(STEPS):
        for micro_batch in range(ACCUMULATION):
            for rank in own_ranks():
                # The loss of a rank that does the work of several is scaled as theirs together would be.
                gradients = [gradient / len(own_ranks()) for gradient in gradients_of(step, micro_batch, rank)]
                backward(groups, gradients)
        held.append(sharded.memory_bytes()["gradients"])
        norms.append(float(sharded.clip_grad_norm_(MAX_NORM)))
        for group in sharded.param_groups:
            group["lr"] *= 0.9
        sharded.step()
    parameters = [parameter for group in groups for parameter in group["params"]]
    return {
        "world_size": get_world_size(),
        "norms": norms,
        "values": [parameter.detach().clone() for parameter in parameters],
        "masters": [sharded.read_master(parameter) for parameter in parameters],
        "moments": [sharded.read_moments(parameter) for parameter in parameters],
        "counters": sharded.counters,
        "memory": sharded.memory_bytes(),
        "held_after_backward": held,
        "gradients_left": sum(parameter.grad is not None for parameter in parameters),
    }


def reference(optimizer: str, options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Plain torch in fp32 on the average of all ranks' gradients, clipped by torch; values rounded as they are used."""
    groups = make_groups(torch.float32)
    for group in groups:
        for parameter in group["params"]:
            parameter.data = parameter.to(dtype).float()
    plain = optimizer_class_by_name(optimizer)(groups, **options)
    parameters = [parameter for group in groups for parameter in group["params"]]
    norms = []
    for step in range(STEPS):
        shares = [gradients_of(step, m, rank) for m in range(ACCUMULATION) for rank in range(RANKS)]
        for index, parameter in enumerate(parameters):
            parameter.grad = sum(share[index] for share in shares) / RANKS
        norms.append(float(nn.utils.clip_grad_norm_(parameters, MAX_NORM)))
        for group in plain.param_groups:
            group["lr"] *= 0.9
        plain.step()
    return {"norms": norms, "masters": [parameter.detach() for parameter in parameters]}


def _moved() -> dict[str, Any]:
    """State read from one optimizer and written to another, which then takes the parameters over."""
    groups = make_groups(torch.float32)
    first = ShardedBlockOptimizer(groups)
    backward(groups, gradients_of(0, 0, get_rank()))
    first.step()
    parameters = [parameter for group in groups for parameter in group["params"]]
    before = [(first.read_master(p), first.read_moments(p)) for p in parameters]
    counters = first.counters
    second = ShardedBlockOptimizer(groups)
    for parameter, (master, moments) in zip(parameters, before, strict=True):
        second.write(parameter, master, moments)
    second.set_counters(counters)
    after = [(second.read_master(p), second.read_moments(p)) for p in parameters]
    counters_after = second.counters
    backward(groups, gradients_of(1, 0, get_rank()))
    norm_of_first = float(first.clip_grad_norm_(math.inf))
    second.step()
    return {
        "before": before,
        "after": after,
        "counters": [counters, counters_after],
        "norm_of_first": norm_of_first,
        "moved": [float((p.detach() - master).abs().max()) for p, (master, _) in zip(parameters, after, strict=True)],
    }


def _state_dict() -> bool:
    """Only rank 0 asks for it, as Trainer does: a collective inside would hang."""
    groups = make_groups(torch.float32)
    sharded = ShardedBlockOptimizer(groups)
    backward(groups, gradients_of(0, 0, get_rank()))
    sharded.step()
    if get_rank() == 0:
        state = sharded.state_dict()
        sharded.load_state_dict(state)
    barrier()
    backward(groups, gradients_of(1, 0, get_rank()))
    sharded.step()
    return sharded.counters == {"step": 2.0}


def _reductions_in_a_backward(may_be_idle: bool) -> int:
    """How many this rank began while its backward ran, in which rank 0's first parameter got no gradient."""
    groups = make_groups(torch.float32)
    engine = ReplicatedBlocks(micro_batches=1)
    optimizer = engine.make_optimizer(groups, torch.optim.SGD, {"lr": 0.1}, may_be_idle)
    gradients = gradients_of(0, 0, get_rank())
    with mock.patch("smt_dist.engines.gradients.dist.reduce") as reduce:
        if get_rank() == 0:
            rest = [{"params": groups[0]["params"][1:]}, *groups[1:]]
            backward(rest, gradients[1:])
        else:
            backward(groups, gradients)
        count = reduce.call_count
    release_gradients(parameter for group in groups for parameter in group["params"])
    del optimizer
    return count


def _clipped_to_nothing() -> float:
    groups = make_groups(torch.float32)
    sharded = ShardedBlockOptimizer(groups, torch.optim.SGD)
    backward(groups, gradients_of(0, 0, get_rank()))
    sharded.clip_grad_norm_(1e-3)
    return float(sharded.clip_grad_norm_(math.inf))


def one_backward_too_many(_folder: Path) -> str:
    """What the second backward of a step says where one was told."""
    groups = make_groups(torch.float32)
    kept = ShardedBlockOptimizer(groups, torch.optim.SGD, {}, micro_batches=1)
    backward(groups, gradients_of(0, 0, get_rank()))
    try:
        backward(groups, gradients_of(0, 1, get_rank()))
    except RuntimeError as error:
        assert kept is not None
        return str(error)
    return "nothing"
