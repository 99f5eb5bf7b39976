"""Define ``ReselectingTrainer``, which trains in rounds with re-selections between them.

The re-selection itself is in ``reselect.py``.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from smt_dist.checkpoint.atomic import VerifiedFolder
from smt_dist.checkpoint.rotation import checkpoint_folder, find_checkpoint
from smt_dist.config import ReselectConfig
from smt_dist.distributed import raise_on_any_rank
from smt_dist.errors import SMTError
from smt_dist.files import parse_json_object, read_text
from smt_dist.training.reselect import reselect
from smt_dist.training.trainer import SMTTrainer

logger = logging.getLogger(__name__)

# Zero moments at a late step: with a beta2 above this, a new block's first steps are several times too long.
LARGE_BETA2 = 0.99


class RoundEnd(TrainerCallback):
    """End a round with a checkpoint every so many steps.

    Attributes:
        ended: whether the round ended here, and not the training.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.ended = False

    def on_train_begin(self, _args: Any, _state: TrainerState, _control: TrainerControl, **_: Any) -> None:
        self.ended = False

    def on_step_end(self, _args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step % self.every == 0 and state.global_step < state.max_steps:
            self.ended = True
            # Otherwise the losses since the last log would be lost.
            control.should_log = control.should_save = control.should_training_stop = True

    def on_epoch_end(self, _args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self.ended:
            return
        if state.epoch is not None and state.epoch % 1:  # no epoch ended
            control.should_log = control.should_save = control.should_evaluate = False
        else:  # what is logged now belongs into the checkpoint too
            control.should_save |= control.should_log or control.should_evaluate


class ReselectingTrainer(SMTTrainer):
    """Re-select blocks where the model's config asks for it (``reselect``).

    Attributes:
        settings: when and how; None: it trains like any other.
    """

    reselects = True

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(model, *args, **kwargs)
        self.settings = model.smt.config.reselect if model.smt.config is not None else None
        self._round_end = RoundEnd(self.settings.every) if self.settings is not None else None
        if self._round_end is not None:
            self.add_callback(self._round_end)

    @property
    def round_ended(self) -> bool:
        """Return whether the last round ended with a re-selection, and not the training."""
        return self._round_end is not None and self._round_end.ended

    def train(
        self,
        resume_from_checkpoint: str | bool | VerifiedFolder | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, as :class:`SMTTrainer` does, in rounds with a re-selection between them."""
        # Trainer has one engine and one optimizer per run, for the blocks that it began with.
        options = {"trial": trial, "ignore_keys_for_eval": ignore_keys_for_eval}
        if self.settings is None:
            return super().train(resume_from_checkpoint, **options)
        return train_in_rounds(self, self.settings, resume_from_checkpoint, options)

    def train_round(self, checkpoint: VerifiedFolder | None, options: dict[str, Any]) -> TrainOutput:
        """Train to the end, or to the next re-selection."""
        return super().train(checkpoint, **options)

    def _load_best_model(self) -> None:
        # At the end of a round it would undo what the next round continues from.
        if not self.round_ended:
            super()._load_best_model()


def trainer_class(model: nn.Module) -> type[SMTTrainer]:
    """Choose the trainer for a model with blocks, by its config."""
    config = model.smt.config
    return ReselectingTrainer if config is not None and config.reselect is not None else SMTTrainer


def check_arguments(trainer: SMTTrainer) -> None:
    """Raise SMTError for flags that would take a round's checkpoint away."""
    args = trainer.args
    if args.save_only_model:
        raise SMTError("--save_only_model: re-selection (reselect) goes on from its checkpoints; leave it out")
    if args.save_strategy == "best":
        raise SMTError("--save_strategy best: re-selection (reselect) needs checkpoints of its own; use another")
    if (args.load_best_model_at_end or args.metric_for_best_model is not None) and args.save_total_limit == 1:
        # Trainer would delete all but the best at the end of a round.
        raise SMTError("--save_total_limit 1 with a best checkpoint: re-selection (reselect) needs at least 2")
    if args.adam_beta2 > LARGE_BETA2 and args.custom_optimizer is None:
        logger.warning(
            "reselect with --adam_beta2 %g: new blocks start at zero moments while the step count goes on, so their "
            "first steps are up to %.1f times too long; 0.95 (the paper's) makes that %.2f",
            args.adam_beta2,
            first_steps_factor(args.adam_beta1, args.adam_beta2),
            first_steps_factor(args.adam_beta1, 0.95),
        )


def first_steps_factor(beta1: float, beta2: float) -> float:
    """Compute how long Adam's longest step from zero moments is, late in training.

    1 is right.
    """
    return max((1 - beta1**k) / math.sqrt(1 - beta2**k) for k in range(1, 1000))


def train_in_rounds(
    trainer: ReselectingTrainer, settings: ReselectConfig, resume: str | bool | VerifiedFolder | None, options: Any
) -> TrainOutput:
    """Train with re-selection; as ``Trainer.train``, with its ``options``."""
    check_arguments(trainer)
    outputs: list[TrainOutput] = []
    checkpoint = find_checkpoint(resume or None, trainer.args.output_dir)
    if checkpoint is None and trainer.model.smt.reselected_at:
        trainer.model.smt.reselected_at = 0  # of another run, whose adapter this one continues
    if checkpoint is not None and raise_on_any_rank(
        lambda: _is_due(trainer, settings, checkpoint.folder), "the checkpoint"
    ):
        checkpoint = reselect(trainer, settings, checkpoint)
    while True:
        outputs.append(trainer.train_round(checkpoint, options))
        # A run that was asked to end at the end of a round re-selects when it goes on.
        if not trainer.round_ended or trainer.preempted:
            return _joined(outputs)
        folder = checkpoint_folder(trainer.args.output_dir, trainer.state.global_step)
        checkpoint = reselect(trainer, settings, find_checkpoint(str(folder), trainer.args.output_dir))
        if trainer.guard.asked_to_end():
            return _joined(outputs)


def _is_due(trainer: SMTTrainer, settings: ReselectConfig, folder: Path) -> bool:
    """Return whether a checkpoint's round ended without the re-selection it is due."""
    path = folder / TRAINER_STATE_NAME
    state = parse_json_object(read_text(path), str(path))
    step = int(state["global_step"])
    last = trainer.args.max_steps if trainer.args.max_steps > 0 else int(state["max_steps"])
    done = trainer.model.smt.reselected_at
    return 0 < step < last and step % settings.every == 0 and done != step


def _joined(outputs: list[TrainOutput]) -> TrainOutput:
    """Join the results of all rounds: losses weighed by steps, rates by time."""
    last = outputs[-1]
    if len(outputs) == 1:
        return last
    times = [output.metrics["train_runtime"] for output in outputs]
    steps = [round(o.metrics["train_steps_per_second"] * time) for o, time in zip(outputs, times, strict=True)]
    loss = sum(o.training_loss * count for o, count in zip(outputs, steps, strict=True)) / max(sum(steps), 1)
    metrics = dict(last.metrics)
    for key in metrics:
        if key.endswith("_per_second"):
            metrics[key] = sum(o.metrics[key] * time for o, time in zip(outputs, times, strict=True)) / sum(times)
    metrics |= {"train_runtime": sum(times), "train_loss": loss}
    return TrainOutput(last.global_step, loss, metrics)
