"""Warm-ups that are looked at while they run, or that are given something wrong."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from tiny_models import VOCABULARY, RoutedModel
from torch import nn

from smt_dist.config import SMTConfig
from smt_dist.data.batches import warmup_batches
from smt_dist.distributed import (
    all_reduce_sum,
    assert_same_on_all_ranks,
    get_rank,
    get_world_size,
    main_process_first,
    raise_on_any_rank,
)
from smt_dist.engines import make_engine
from smt_dist.errors import SMTError
from smt_dist.selection import warmup
from smt_dist.selection.scores import ElementwiseAccumulator
from smt_dist.selection.warmup import collect_scores
from smt_dist.sparse.layer_names import layer_key
from workers.runs import elements_held, engine_arguments, load_model, standard_data

ROUTED_SCORES = ["mean_abs", "abs_mean", "l1", "l2", "mean_abs_per_step", "l2_per_step"]


# -- routing that differs by rank ------------------------------------------------------------------------------


def routed_config(score: str) -> SMTConfig:
    """Every expert and every shared layer of :class:`RoutedModel`."""
    groups = [
        {"name": "experts", "target_modules": r"layers\.\d+\.experts\.\d+", "blocks": 20},
        {"name": "shared", "target_modules": ["shared"], "blocks": 10},
    ]
    return SMTConfig.model_validate(
        {"block_size": 4, "groups": groups, "selection": {"score": score}, "warmup": {"steps": 2}}
    )


def routed_rows() -> list[list[dict[str, torch.Tensor]]]:
    """Two global steps of four rows. Rows 0 and 1 of each reach expert 0 of the outer layers and nothing else.

    So on 2 ranks, rank 0 gets no gradient for experts 1 and 2 and none for the middle layer; on 4 ranks, row 3
    has no label besides.
    """
    generator = torch.Generator().manual_seed(3)
    steps = []
    for _ in range(2):
        rows = []
        for index in range(4):
            ids = torch.randint(3, VOCABULARY, (1, 9), generator=generator)
            if index < 2:
                ids = ids % (VOCABULARY // 6) * 3  # multiples of 3 below half the vocabulary
            labels = ids.clone()
            labels[:, : 2 + index] = -100
            if index == 3:
                labels[:] = -100
            rows.append({"input_ids": ids, "labels": labels})
        steps.append(rows)
    return steps


def routed_tables() -> dict[str, Any]:
    """Scores of the toy mixture of experts from this rank's share of :func:`routed_rows`."""
    per_rank = 4 // get_world_size()
    own = slice(get_rank() * per_rank, (get_rank() + 1) * per_rank)
    batches = [step[own] for step in routed_rows()]
    return {score: collect_scores(RoutedModel(), batches, routed_config(score)).tables for score in ROUTED_SCORES}


def unreached_modules() -> list[str]:
    """List the experts that this rank's rows don't reach in any step."""
    model = RoutedModel()
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "head"]
    per_rank = 4 // get_world_size()
    for step in routed_rows():
        for row in step[get_rank() * per_rank : (get_rank() + 1) * per_rank]:
            model(row["input_ids"], row["labels"]).logits.sum().backward()
    return [name for name in names if model.get_submodule(name).weight.grad is None]


# -- the memory promise ----------------------------------------------------------------------------------------


class _Watched(ElementwiseAccumulator):
    """Looks after every gradient and every step at what is alive in the process."""

    def __init__(self, model: nn.Module, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._model = model
        self._targets = dict(self._grids)
        self.most_gradient_elements = 0
        self.shard_bytes: list[int] = []
        self.weight_gradients = 0
        self.optimizers = 0
        self.calls = 0

    def add(self, module: str, grad_y: torch.Tensor, kept: torch.Tensor) -> None:
        super().add(module, grad_y, kept)
        self.calls += 1
        self._look()

    def end_step(self) -> None:
        rows = {-(-grid.rows // get_world_size()): grid.cols for grid in self._targets.values()}
        live = [t for t in _live_tensors() if t.dim() == 2 and rows.get(t.shape[0]) == t.shape[1]]
        self.shard_bytes.append(sum(t.numel() * t.element_size() for t in live))
        super().end_step()

    def _look(self) -> None:
        shapes = {(grid.rows, grid.cols) for grid in self._targets.values()}
        gradients = [tensor for tensor in _live_tensors() if tuple(tensor.shape) in shapes]
        self.most_gradient_elements = max(self.most_gradient_elements, sum(t.numel() for t in gradients))
        self.weight_gradients += sum(parameter.grad is not None for parameter in self._model.parameters())
        self.optimizers += sum(isinstance(thing, torch.optim.Optimizer) for thing in gc.get_objects())


def _live_tensors() -> list[torch.Tensor]:
    """Every tensor that Python knows and that is no parameter, each storage once."""
    found = {}
    for thing in gc.get_objects():
        if type(thing) is torch.Tensor and thing.is_floating_point() and thing.numel():
            found[thing.untyped_storage().data_ptr()] = thing
    return list(found.values())


def memory(folder: Path, engine: str, model: str) -> dict[str, Any]:
    """What was alive during elementwise scoring of the MLPs: (hidden 64, intermediate 176) leave no doubt."""
    data = standard_data()
    watched: list[_Watched] = []

    def make(score: str, grids: Any, device: torch.device, _weights: Any) -> _Watched:
        watched.append(_Watched(base, score, grids, device, False))
        return watched[0]

    group = {"target_modules": ["up_proj", "down_proj", "gate_proj"], "blocks": 3}
    config = SMTConfig.model_validate({"block_size": 16, "groups": [group], "warmup": {"steps": 2}})
    with engine_arguments(engine, folder / engine, accumulation=2) as args:
        base = load_model(model, args)
        with (
            mock.patch.object(warmup, "make_accumulator", make),
            make_engine(args.engine_options).scoring(base),
        ):
            scores = collect_scores(base, warmup_batches(data, args.batch_order, 2), config)
        layers: dict[str, int] = {}
        for name, (rows, cols) in scores.shapes.items():
            layers[layer_key(name)] = layers.get(layer_key(name), 0) + rows * cols
        return {
            "world_size": get_world_size(),
            "base_elements_held": elements_held(base),
            "calls": watched[0].calls,
            "weight_gradients": watched[0].weight_gradients,
            "weight_gradients_after": sum(parameter.grad is not None for parameter in base.parameters()),
            "optimizers": watched[0].optimizers,
            "most_gradient_elements": watched[0].most_gradient_elements,
            "shard_bytes": watched[0].shard_bytes,
            "layer_elements": max(layers.values()),
            "target_elements": sum(layers.values()),
        }


# -- faults ----------------------------------------------------------------------------------------------------


def faults() -> dict[str, str]:
    """Fault -> what this rank raised, as ``"ErrorType: message"``."""
    return {
        name: _caught(action)
        for name, action in {
            "one rank has fewer micro-batches": _fewer_micro_batches,
            "one rank has fewer steps": _fewer_steps,
            "one rank has no batch": lambda: _collect([] if _is_last() else _own_steps()),
            "one rank has a batch without labels": _labels_missing,
            "nothing but masked labels": _all_masked,
            "NaN on one rank, elementwise": lambda: _not_a_number("abs_mean"),
            "NaN on one rank, streamed": lambda: _not_a_number("mean_abs"),
            "the last rank differs": lambda: assert_same_on_all_ranks(b"ab"[_is_last() :], "the selection"),
            "the last rank fails": lambda: raise_on_any_rank(_fail_on_last, "reading"),
            "rank 0 fails first": lambda: main_process_first(_fail_on_first, "converting"),
        }.items()
    }


def without_faults() -> dict[str, Any]:
    """The same helpers where nothing is wrong, after all those faults: the group must still be in step."""
    assert_same_on_all_ranks(b"same", "the selection")
    return {
        "raise_on_any_rank": raise_on_any_rank(lambda: get_rank() * 10, "reading"),
        "main_process_first": main_process_first(lambda: get_rank() + 1, "converting"),
        "sum": all_reduce_sum(torch.tensor([float(get_rank() + 1)])).item(),
    }


def _caught(action: Callable[[], Any]) -> str:
    try:
        action()
    except (SMTError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def _is_last() -> bool:
    return get_rank() == get_world_size() - 1


def _own_steps() -> list[list[dict[str, torch.Tensor]]]:
    return [step[get_rank() : get_rank() + 1] * 2 for step in routed_rows()]


def _collect(batches: list[Any], score: str = "abs_mean", model: nn.Module | None = None) -> None:
    collect_scores(model or RoutedModel(), batches, routed_config(score))


def _fewer_micro_batches() -> None:
    steps = _own_steps()
    _collect([steps[0], steps[1][: 1 if _is_last() else 2]])


def _fewer_steps() -> None:
    _collect(_own_steps()[: 1 if _is_last() else 2])


def _labels_missing() -> None:
    _collect([[{"input_ids": step[0]["input_ids"]} if _is_last() else step[0]] for step in _own_steps()])


def _all_masked() -> None:
    _collect([[{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in s] for s in _own_steps()])


def _not_a_number(score: str) -> None:
    model = RoutedModel()
    if _is_last():
        # Before the backward of the module and of the scoring hook on its output.
        model.layers[2]["shared"].register_full_backward_pre_hook(_spoil_gradient)
    # Row 2 has labels on every rank's copy, so that NaN doesn't come from a mean over nothing.
    _collect([[step[2]] for step in routed_rows()], score, model)


def _spoil_gradient(_module: nn.Module, gradients: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(gradient * torch.nan for gradient in gradients)


def _fail_on_last() -> None:
    if _is_last():
        raise SMTError("rows.json: row 3 is malformed")


def _fail_on_first() -> None:
    if get_rank() == 0:
        raise SMTError("model.gguf: damaged")


def everything(folder: Path, model: str, engines: list[str]) -> dict[str, Any]:
    """All of this module, in one start of the processes."""
    result: dict[str, Any] = {"unreached": unreached_modules(), "routed": routed_tables()}
    if get_world_size() > 1:
        result |= {"faults": faults(), "without faults": without_faults()}
        result["memory"] = {engine: memory(folder, engine, model) for engine in engines}
    return result
