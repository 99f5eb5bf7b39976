"""The half of ``SMTTrainer`` that writes: whole saves on one rank, of which all ranks know whether they worked.

Overrides methods of transformers 5.23 (``tests/test_checkpoint.py`` checks that each still exists).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from smt_dist.checkpoint.adapter import delta_shape, write_blocks_of
from smt_dist.checkpoint.atomic import Save
from smt_dist.checkpoint.rotation import (
    checkpoint_folder,
    find_checkpoint,
    is_whole,
    prune_checkpoints,
    remove_leftovers,
)
from smt_dist.checkpoint.trainer_state import save_metrics, save_trainer_state
from smt_dist.checkpoint.training_state import random_state, save_moments, save_random_states, save_schedule
from smt_dist.distributed import agree, from_main_process, gather_objects, get_world_size
from smt_dist.engines.base import Engine
from smt_dist.errors import SMTError
from smt_dist.files import save_tokenizer
from smt_dist.sparse.surgery import group_multipliers, sparse_layers

logger = logging.getLogger(__name__)


class SavingTrainer(Trainer):
    """``transformers.Trainer`` whose saves are adapters and checkpoints of blocks, whole or not there."""

    engine: Engine

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter (and the tokenizer), whole or not at all; never the base. Collective."""
        folder = Path(output_dir or self.args.output_dir)
        if _internal_call:  # a part of a checkpoint
            self._write_adapter(folder)
        else:
            with self._saving(folder) as beside:
                self._write_adapter(beside)

    def _write_adapter(self, folder: Path) -> None:
        deltas = self.engine.read_blocks(self.model, self.optimizer)

        def write() -> None:
            write_blocks_of(self.model, folder, deltas, card=self._card_lines())
            if self.processing_class is not None:
                save_tokenizer(self.processing_class, folder)

        self._write_on_one_rank(write, deltas, folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:  # noqa: ARG002
        """As Trainer's, whole or not at all."""
        self.store_flos()
        run, state = Path(self._get_output_dir(trial=trial)), self.state
        folder = checkpoint_folder(run, state.global_step)
        with self._saving(folder) as beside:
            self.save_model(str(beside), _internal_call=True)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(beside))
                self._save_rng_state(str(beside))
            exportable = [*self.callback_handler.callbacks, self.control]
            self._write_on_one_rank(lambda: save_trainer_state(beside, state, exportable), (), folder)
        if state.best_global_step and (best := self._best_checkpoint(run)) is not None:
            state.best_model_checkpoint = best
        if self.args.should_save:
            keep = {folder} | ({Path(state.best_model_checkpoint)} if state.best_model_checkpoint else set())
            prune_checkpoints(run, self.args.save_total_limit, keep)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder, moments = Path(output_dir), self.engine.read_moments(self.model, self.optimizer)

        def write() -> None:
            selection = self.model.smt_selection
            shapes = {name: delta_shape(selection, name) for name in sparse_layers(self.model)}
            save_moments(folder, shapes, moments)
            multipliers = group_multipliers(self.model)
            save_schedule(folder, self.lr_scheduler.state_dict(), self._global_batch_size(), multipliers)

        self._write_on_one_rank(write, moments.tensors, folder)

    @contextmanager
    def _saving(self, folder: Path) -> Iterator[Path]:
        """Where the writing rank writes; on all ranks or none it becomes ``folder`` at the end. Collective."""
        save = Save(folder)

        def begin() -> None:
            remove_leftovers(self.args.output_dir)
            save.begin()

        try:
            self._write_on_one_rank(begin, (), folder)
            yield save.folder
            self._write_on_one_rank(save.commit, (), folder)
        finally:
            save.close()

    def _write_on_one_rank(self, write: Callable[[], object], tensors: Iterable[Any], folder: Path) -> None:
        """Run ``write``, which reads ``tensors``, where checkpoints are written; all ranks fail if it fails.

        Reading is collective: ranks that don't write read too, and so does one whose writing failed.
        """

        def result() -> None:
            if isinstance(failure, OSError):
                reason = failure.strerror or failure
                raise SMTError(f"{folder}: can't be written ({reason}); what was saved before is untouched")
            if failure is not None:
                raise failure

        failure: OSError | SMTError | None = None
        if self.args.should_save:
            try:
                write()
            except (OSError, SMTError) as error:
                failure = error
        deque(tensors, maxlen=0)  # keeps none, not even while the next is read
        agree(result, "saving")

    def _save_rng_state(self, output_dir: str) -> None:
        # One rank writes all files: what it measures for the manifest can't lag behind on a network's file system.
        folder, states = Path(output_dir), gather_objects(random_state())
        self._write_on_one_rank(lambda: save_random_states(folder, states), (), folder)

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """Trainer's, whole or not at all, and on all ranks or none. Collective."""
        folder = Path(self.args.output_dir)
        self._write_on_one_rank(lambda: save_metrics(folder, split, metrics, combined), (), folder)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, trial: Any = None, ignore_keys_for_eval: Any = None
    ) -> Any:
        """Trainer's, from a checkpoint that is whole (True: the newest such in ``output_dir``).

        Raises:
            SMTError: the checkpoint that is named is damaged, or there is none.
        """
        resume_from = find_checkpoint(resume_from_checkpoint or None, self.args.output_dir)
        return super().train(resume_from, trial, ignore_keys_for_eval)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: Any,
        trial: Any,
    ) -> tuple[int, int]:
        progress = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is not None and self.state.best_global_step:
            # By its step, beside this one: a path that stands in a file could be anybody's.
            self.state.best_model_checkpoint = self._best_checkpoint(Path(resume_from_checkpoint).parent)
        return progress

    def _best_checkpoint(self, run: Path) -> str | None:
        """The best checkpoint among those in ``run``, if it is there: as rank 0 sees the disk, for all. Collective."""
        best = checkpoint_folder(run, self.state.best_global_step)
        return from_main_process(lambda: str(best) if best.is_dir() else None, "the best checkpoint")

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        best = self.state.best_model_checkpoint
        # With --save_total_limit 1 Trainer deletes all others now. (A best one that is to be loaded is verified then.)
        if best is not None and not self.args.load_best_model_at_end and not is_whole(Path(best)):
            logger.warning("%s, the best checkpoint, is damaged or gone: all others stay", best)
            self.state.best_model_checkpoint = None
        return super()._finalize_training(trial, num_train_samples, start_time)

    def _global_batch_size(self) -> int:
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * get_world_size()

    def _card_lines(self) -> str:
        return (
            f"\nTrained for {self.state.global_step} steps, learning rate {self.args.learning_rate:g}, base in "
            f"{self.args.dtype}.\n"
        )
