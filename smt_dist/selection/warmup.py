"""Score every block of the targets over all ranks in the warm-up.

In ``scoring`` mode no weight changes, no weight gets a ``.grad`` and no optimizer exists. The targets' outputs pass
through a small autograd function that gives (input, output gradient) to the accumulator, so scoring works
on any base that can compute gradients of its activations: plain, partitioned by ZeRO-3 or sharded by FSDP2.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from smt_dist.config import ACTIVATION, DATA_FREE_SCORES, SMTConfig
from smt_dist.distributed import raise_on_any_rank
from smt_dist.engines.base import Tuning
from smt_dist.errors import SMTError
from smt_dist.selection.activations import block_rms, collect_input_rms
from smt_dist.selection.block_scores import BlockScores
from smt_dist.selection.custom_scores import ScoreFunction, custom_tables, load_score_function
from smt_dist.selection.scores import GradientAccumulator, ScoreAccumulator, WeightReader, make_accumulator
from smt_dist.selection.scoring_hooks import scoring_hooks
from smt_dist.selection.steps import Batch, Observer, device_of, frozen, run_steps, seeded
from smt_dist.selection.weight_scores import score_without_data
from smt_dist.sparse.blocks import BlockGrid, resolve_block_size
from smt_dist.sparse.layer_names import layer_key
from smt_dist.sparse.sharded import gathered
from smt_dist.sparse.targets import count_parameters_2d, find_targets, weight_shape

logger = logging.getLogger(__name__)

Tables = dict[str, torch.Tensor]


def collect_scores(
    model: nn.Module,
    batches: Iterable[Batch | list[Batch]],
    config: SMTConfig,
    progress: bool = False,
    observe: Observer | None = None,
) -> BlockScores:
    """Score every block of the target weights, on up to ``config.warmup.steps`` global steps.

    ``g_t`` is the gradient of (sum of token losses over all ranks and micro-batches of global step t) / (number
    of unmasked label tokens of that step), so unequal prompt masks weigh as they do in training. A score that needs no
    gradient runs no backward, and a score that needs no data reads no batch.

    Args:
        model: a causal language model on its device; under ZeRO-3 with the engine's hooks
            (:meth:`smt_dist.engines.base.Engine.scoring`). It isn't changed.
        batches: this rank's micro-batches as keyword arguments; each item is one global step: one micro-batch or a
            list of them. All ranks need equally many.
        config: gives score, targets, steps and passes. More than one pass reads ``batches`` into a list.
        progress: show a progress bar on rank 0.
        observe: called before the first step and after each one, if batches are read.

    Returns:
        Scores of all targets, equal on all ranks.

    Raises:
        SMTError: no batch, batches that differ in number between ranks, a step without labels, a non-finite
            gradient or score (names the module), or what :func:`find_targets` refuses.
    """
    groups, grids = plan_grids(model, config)
    chosen, weights = config.selection, weight_reader(model)
    steps = 0
    if chosen.score in DATA_FREE_SCORES:
        tables = score_without_data(chosen.score, grids, weights, chosen.seed, progress)
    elif chosen.is_custom:
        function = raise_on_any_rank(lambda: load_score_function(chosen.score), "the score function")
        tables, steps = _custom_scores(model, batches, config, grids, function, progress, observe)
    elif chosen.score == ACTIVATION:
        columns, steps = collect_input_rms(model, grids, batches, config.warmup.steps, progress, observe)
        tables = {name: block_rms(columns[name], grid) for name, grid in grids.items()}
    else:

        def make(part: Mapping[str, BlockGrid]) -> ScoreAccumulator:
            return make_accumulator(chosen.score, part, device_of(model), weights)

        def finish(found: ScoreAccumulator, _: Mapping[str, BlockGrid]) -> Tables:
            return found.tables()

        tables, steps = _gradient_scores(model, batches, config, grids, make, finish, progress, observe)
    if config.selection.needs_batches and 0 < steps < config.warmup.steps:
        logger.warning(
            "warm-up: the batches ended after %d of warmup.steps=%d global steps", steps, config.warmup.steps
        )
    return build_scores(model, config, groups, grids, tables, steps)


def weight_reader(model: nn.Module) -> WeightReader:
    """Return a context manager factory that gathers one whole weight by module name."""
    return lambda module: gathered(model.get_submodule(module).weight)


def _gradient_scores(
    model: nn.Module,
    batches: Iterable[Batch | list[Batch]],
    config: SMTConfig,
    grids: dict[str, BlockGrid],
    make: Callable[[Mapping[str, BlockGrid]], Any],
    finish: Callable[[Any, Mapping[str, BlockGrid]], Tables],
    progress: bool,
    observe: Observer | None = None,
) -> tuple[Tables, int]:
    """Run the batches once per pass into an accumulator; return the tables and the steps run.

    ``make`` makes the accumulator for a pass's grids, ``finish`` computes their tables from it.
    """
    parts = _split_layers(grids, config.warmup.passes)
    if len(parts) > 1:
        batches = list(batches)
    tables: Tables = {}
    steps = 0
    for index, part in enumerate(parts):
        accumulator = make(part)
        with frozen(model), scoring_hooks(model, accumulator, part), seeded(config.selection.seed):
            label = "warm-up" if len(parts) == 1 else f"warm-up, pass {index + 1} of {len(parts)}"
            backward_only = Tuning(model, torch.Tensor.backward, lambda: None)
            label = label if progress else None
            steps = run_steps(model, backward_only, batches, config.warmup.steps, accumulator, label, observe)
        tables.update(finish(accumulator, part))
    return tables, steps


def _custom_scores(
    model: nn.Module,
    batches: Iterable[Batch | list[Batch]],
    config: SMTConfig,
    grids: dict[str, BlockGrid],
    function: ScoreFunction,
    progress: bool,
    observe: Observer | None = None,
) -> tuple[Tables, int]:
    """Compute what the user's function takes, call it, and return the tables and the steps run."""
    weights, steps = weight_reader(model), 0
    columns: Tables = {}
    if function.takes >= {"gradient", "input_rms"}:
        batches = list(batches)
    if "input_rms" in function.takes:
        columns, steps = collect_input_rms(model, grids, batches, config.warmup.steps, progress, observe)
    if "gradient" not in function.takes:
        return custom_tables(function, grids, weights, None, columns), steps

    def make(part: Mapping[str, BlockGrid]) -> GradientAccumulator:
        return GradientAccumulator(part, device_of(model))

    def finish(accumulator: GradientAccumulator, part: Mapping[str, BlockGrid]) -> Tables:
        return custom_tables(function, part, weights, accumulator, columns)

    return _gradient_scores(model, batches, config, grids, make, finish, progress, observe)


def plan_grids(model: nn.Module, config: SMTConfig) -> tuple[dict[str, list[str]], dict[str, BlockGrid]]:
    """Find the target modules and cut their weights into blocks.

    Returns:
        Group name -> target modules; and module -> grid, in the model's order.

    Raises:
        SMTError: from :func:`find_targets` or :func:`resolve_block_size`.
    """
    groups = find_targets(model, config)
    targets = {name for names in groups.values() for name in names}
    shapes = {name: weight_shape(module) for name, module in model.named_modules() if name in targets}
    block_size = resolve_block_size(config.block_size, shapes)
    return groups, {name: BlockGrid(*shape, *block_size) for name, shape in shapes.items()}


def build_scores(
    model: nn.Module,
    config: SMTConfig,
    groups: dict[str, list[str]],
    grids: dict[str, BlockGrid],
    tables: Mapping[str, torch.Tensor],
    steps: int,
) -> BlockScores:
    """Build ``BlockScores`` from tables, on the CPU.

    Raises:
        SMTError: a score is NaN or infinity; names the module.
    """
    for name in grids:
        if tables[name].isnan().any() or tables[name].isposinf().any():  # minus infinity: never chosen
            raise SMTError(f"warm-up: the score of {name} is not finite (NaN or infinity)")
    first = next(iter(grids.values()))
    return BlockScores(
        block_size=(first.block_rows, first.block_cols),
        tables={name: tables[name].cpu() for name in grids},
        shapes={name: (grid.rows, grid.cols) for name, grid in grids.items()},
        groups=groups,
        parameters_2d=count_parameters_2d(model),
        score=config.selection.score,
        steps=steps,
    )


def _split_layers(grids: dict[str, BlockGrid], passes: int) -> list[dict[str, BlockGrid]]:
    """Split the targets into at most ``passes`` groups of consecutive whole layers."""
    layers = list(dict.fromkeys(layer_key(name) for name in grids))
    size = -(-len(layers) // passes)
    runs = [set(layers[start : start + size]) for start in range(0, len(layers), size)]
    return [{name: grid for name, grid in grids.items() if layer_key(name) in run} for run in runs]
