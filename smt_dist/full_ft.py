"""The authors' warm-up, for reproduction: real full fine-tuning whose gradients are scored as they pass.

Its peak memory is full fine-tuning's, and it moves the base: the blocks then belong to the moved base.
"""

from __future__ import annotations

import copy
from typing import Any

import datasets
from torch import nn
from transformers import Trainer, TrainerCallback

from smt_dist.arguments import SMTTrainingArguments
from smt_dist.config import SMTConfig
from smt_dist.data import CausalLMCollator
from smt_dist.distributed import get_world_size
from smt_dist.errors import SMTError
from smt_dist.scores import BlockScores, ScoreAccumulator, make_accumulator
from smt_dist.warmup import build_scores, plan_grids, probe_modules


def collect_scores_full_ft(
    model: nn.Module,
    dataset: datasets.Dataset,
    collator: CausalLMCollator,
    config: SMTConfig,
    args: SMTTrainingArguments,
) -> BlockScores:
    """Fully fine-tune ``model`` for ``config.warmup.steps`` steps with Trainer and score the gradients.

    Args:
        model: moved in place.
        dataset: tokenised rows.
        collator: makes micro-batches.
        config: its score and targets.
        args: engine, batch size, learning rate and optimizer of the run to come.

    Raises:
        SMTError: a non-finite gradient; names the module. And what :func:`find_targets` refuses.
    """
    groups, grids = plan_grids(model, config)
    accumulator = make_accumulator(config.selection.score, grids, args.device)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    trainer = Trainer(
        model=model,
        args=_warmup_arguments(args, config.warmup.steps),
        train_dataset=dataset,
        data_collator=collator,
        callbacks=[_StepEnds(accumulator)],
    )
    with probe_modules(model, accumulator, grids):
        trainer.train()
    if args.engine == "deepspeed":
        trainer.model_wrapped.destroy()
    if (module := accumulator.non_finite_module()) is not None:
        raise SMTError(f"full_ft warm-up: the gradient of {module} is not finite (NaN or infinity)")
    # Trainer multiplies the loss by the world size, for engines that average gradients over ranks.
    tables = {name: table / get_world_size() for name, table in accumulator.tables().items()}
    return build_scores(model, config, groups, grids, tables, trainer.state.global_step)


def _warmup_arguments(args: SMTTrainingArguments, steps: int) -> SMTTrainingArguments:
    """``args`` for a short run that saves, evaluates and reports nothing."""
    own = copy.copy(args)
    own.max_steps, own.warmup_steps = steps, 0
    own.save_strategy, own.eval_strategy, own.load_best_model_at_end = "no", "no", False
    own.report_to, own.resume_from_checkpoint = [], None
    return own


class _StepEnds(TrainerCallback):
    """Tells the accumulator where micro-batches and steps end."""

    def __init__(self, accumulator: ScoreAccumulator) -> None:
        self._accumulator = accumulator

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self._accumulator.end_micro_batch()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._accumulator.end_micro_batch()
        self._accumulator.end_step()
