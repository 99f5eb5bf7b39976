"""Score blocks while fully fine-tuning the model, as the authors' warm-up does.

It is for reproduction: its peak memory is that of full fine-tuning, and it changes the base weights, so the selected
blocks belong to the changed base.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from smt_dist.config import SMTConfig
from smt_dist.distributed import get_world_size
from smt_dist.engines.base import Engine, Tuning
from smt_dist.selection.block_scores import BlockScores
from smt_dist.selection.scores import make_accumulator
from smt_dist.selection.scoring_hooks import scoring_hooks
from smt_dist.selection.steps import Batch, Observer, run_steps
from smt_dist.selection.warmup import build_scores, plan_grids


def collect_scores_full_ft(
    model: nn.Module,
    batches: Iterable[list[Batch]],
    config: SMTConfig,
    engine: Engine,
    learning_rate: float,
    accumulation: int = 1,
    progress: bool = False,
    observe: Observer | None = None,
) -> BlockScores:
    """Fully fine-tune ``model`` for ``config.warmup.steps`` steps and score the gradients.

    Args:
        model: trained in place; all its parameters are made trainable.
        batches: as for :func:`collect_scores`.
        config: its score and targets.
        engine: trains the full model.
        learning_rate: of AdamW, constant.
        accumulation: micro-batches per global step.
        progress: show a progress bar on rank 0.
        observe: called before the first step and after each one.

    Returns:
        Scores of all targets, equal on all ranks.

    Raises:
        SMTError: as :func:`collect_scores`.
    """
    groups, grids = plan_grids(model, config)
    accumulator = make_accumulator(config.selection.score, grids, next(model.parameters()).device)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.train()
    label = "warm-up (full fine-tuning)" if progress else None
    with engine.full_finetuning(model, learning_rate, accumulation) as tuning, scoring_hooks(model, accumulator, grids):
        steps = run_steps(model, _summed(tuning), batches, config.warmup.steps, accumulator, label, observe)
    tables = {name: table / get_world_size() for name, table in accumulator.tables().items()}
    return build_scores(model, config, groups, grids, tables, steps)


def _summed(tuning: Tuning) -> Tuning:
    """Scale the loss by the world size, so that the engine's mean over ranks becomes a sum.

    The caller divides the scores by the world size.
    """

    def backward(loss: torch.Tensor) -> None:
        tuning.backward(loss * get_world_size())

    return tuning._replace(backward=backward)
