"""Load and call the user's score functions, given by dotted name in the config.

A function scores one module at a time. It takes any of these arguments, by name:

    module      the module's name
    grid        its BlockGrid: shape, block_rows, block_cols, ...
    weight      its whole weight [out, in], in the base's dtype; read only
    gradient    G, the gradient summed over the warm-up, fp32 [out, in], whole
    input_rms   the root mean square of each input column over all real tokens, fp64 [in]

It returns one finite number per block: a tensor (or nested lists, or an array) of ``grid.shape``; higher is better.
Arguments that it doesn't take aren't computed: without ``gradient`` no backward runs, without ``gradient`` and
``input_rms`` no batch is read. Every rank calls it, with equal arguments; rank 0's result is used.

    def spread(weight, grid):
        blocks = weight.float().unflatten(0, (-1, grid.block_rows)).unflatten(2, (-1, grid.block_cols))
        return blocks.var(dim=(1, 3))
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch

from smt_dist.distributed import broadcast_first, raise_on_any_rank
from smt_dist.errors import SMTError, first_line
from smt_dist.selection.scores import GradientAccumulator, WeightReader
from smt_dist.sparse.blocks import BlockGrid

ARGUMENTS = ("module", "grid", "weight", "gradient", "input_rms")


class ScoreFunction(NamedTuple):
    """Describe a user's score function.

    Attributes:
        name: its dotted name.
        function: the callable.
        takes: which of :data:`ARGUMENTS` it takes.
    """

    name: str
    function: Callable[..., Any]
    takes: frozenset[str]

    @property
    def needs_batches(self) -> bool:
        """Return whether the function takes an argument that is computed from batches."""
        return bool(self.takes & {"gradient", "input_rms"})


def load_score_function(name: str) -> ScoreFunction:
    """Import a score function by its dotted name.

    Raises:
        SMTError: it can't be imported, isn't a function, or requires an argument that isn't one of :data:`ARGUMENTS`.
    """
    module, _, attribute = name.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise SMTError(f"smt config selection.score: {name} can't be imported ({first_line(error)})") from None
    if not callable(function):
        raise SMTError(f"smt config selection.score: {name} is not a function")
    try:
        parameters = inspect.signature(function).parameters.values()
    except (ValueError, TypeError):  # a builtin
        raise SMTError(f"smt config selection.score: {name} has no readable signature; wrap it in a function") from None
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    required = {p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
    if unknown := sorted(required - set(ARGUMENTS)):
        raise SMTError(
            f"smt config selection.score: {name} requires an argument {unknown[0]!r}; use only {', '.join(ARGUMENTS)}"
        )
    return ScoreFunction(name, function, frozenset(named & set(ARGUMENTS)))


def custom_tables(
    score: ScoreFunction,
    grids: Mapping[str, BlockGrid],
    weights: WeightReader,
    gradients: GradientAccumulator | None,
    input_rms: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Call the score function for each module; collective.

    Args:
        score: the function.
        grids: of the modules, in the model's order.
        weights: used if the function takes ``weight``.
        gradients: the accumulator after the warm-up, if the function takes ``gradient``.
        input_rms: of each module, if the function takes ``input_rms``.

    Returns:
        Module -> fp64 CPU scores ``[block rows, block columns]``, equal on all ranks.

    Raises:
        SMTError: a result has the wrong shape or isn't finite; names function and module.
    """
    tables = {}
    for module, grid in grids.items():
        with ExitStack() as stack:
            arguments: dict[str, Any] = {"module": module, "grid": grid}
            if "weight" in score.takes:
                arguments["weight"] = stack.enter_context(weights(module)).detach()
            if gradients is not None:
                arguments["gradient"] = gradients.gradient(module)
            if module in input_rms:
                arguments["input_rms"] = input_rms[module]
            result = score.function(**{name: arguments[name] for name in score.takes})
        tables[module] = broadcast_first(raise_on_any_rank(partial(_checked, result, score, module, grid), "the score"))
    return tables


def _checked(result: Any, score: ScoreFunction, module: str, grid: BlockGrid) -> torch.Tensor:
    where = f"smt config selection.score: {score.name}, {module}"
    try:
        table = torch.as_tensor(result).detach().to("cpu", torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise SMTError(f"{where}: the result is not a tensor ({first_line(error)})") from None
    if tuple(table.shape) != grid.shape:
        raise SMTError(f"{where}: the result has shape {tuple(table.shape)}, expected {grid.shape}, one per block")
    if not table.isfinite().all():
        block = tuple((~table.isfinite()).nonzero()[0].tolist())
        raise SMTError(f"{where}: the score of block {block} is not finite ({table[block].item()})")
    return table.contiguous()
