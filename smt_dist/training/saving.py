"""Save on one rank, whole or not at all, and raise on all ranks if that fails."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import Trainer

from smt_dist.checkpoint.adapter import delta_shape, write_blocks_of
from smt_dist.checkpoint.atomic import Save
from smt_dist.checkpoint.rotation import checkpoint_folder, is_whole, prune_checkpoints, remove_leftovers
from smt_dist.checkpoint.trainer_state import save_metrics, save_trainer_state
from smt_dist.checkpoint.training_state import random_state, save_moments, save_random_states, save_schedule
from smt_dist.distributed import from_main_process, gather_objects, get_world_size, raise_on_any_rank
from smt_dist.engines.base import Engine
from smt_dist.errors import SMTError
from smt_dist.files import save_tokenizer
from smt_dist.sparse.surgery import group_multipliers, sparse_layers
from smt_dist.training.arguments import SMTTrainingArguments

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Write adapters and checkpoints of blocks, whole or not at all, never the base.

    All methods are collective.

    Args:
        trainer: whose model, optimizer and state are written.
        engine: reads blocks and moments.
    """

    def __init__(self, trainer: Trainer, engine: Engine) -> None:
        self.trainer = trainer
        self.engine = engine

    def write_adapter(self, folder: Path) -> None:
        """Write the blocks as an adapter, with the tokenizer."""
        with self._saving(folder) as beside:
            self._write_blocks(beside)

    def write_checkpoint(self, output_dir: Path) -> None:
        """Write all that a run goes on from, and delete checkpoints beyond ``--save_total_limit``."""
        trainer, state = self.trainer, self.trainer.state
        trainer.store_flos()
        folder = checkpoint_folder(output_dir, state.global_step)
        with self._saving(folder) as beside:
            self._write_blocks(beside)
            if not trainer.args.save_only_model:
                self._write_optimizer(beside)
                self._write_random_states(beside)
            exportable = [*trainer.callback_handler.callbacks, trainer.control]
            self._write_on_one_rank(lambda: save_trainer_state(beside, state, exportable), (), folder)
        if state.best_global_step and (best := self.best_checkpoint(output_dir)) is not None:
            state.best_model_checkpoint = best
        if trainer.args.should_save:
            keep = {folder} | ({Path(state.best_model_checkpoint)} if state.best_model_checkpoint else set())
            prune_checkpoints(output_dir, trainer.args.save_total_limit, keep)

    def write_metrics(self, split: str, metrics: dict[str, float], combined: bool) -> None:
        """Write ``<split>_results.json``, and add to ``all_results.json`` where ``combined``."""
        folder = Path(self.trainer.args.output_dir)
        self._write_on_one_rank(lambda: save_metrics(folder, split, metrics, combined), (), folder)

    def best_checkpoint(self, output_dir: Path) -> str | None:
        """Find the best checkpoint in ``output_dir``, as rank 0 sees the disk; None if it is gone."""
        best = checkpoint_folder(output_dir, self.trainer.state.best_global_step)
        return from_main_process(lambda: str(best) if best.is_dir() else None, "the best checkpoint")

    @contextmanager
    def keeping_checkpoints(self, is_preempted: bool) -> Iterator[None]:
        """Keep Trainer from deleting, at the end of training, what a run goes on from.

        With ``--save_total_limit 1`` it deletes all checkpoints but the best.

        Args:
            is_preempted: the newest was just saved, although it may not be the best.
        """
        args, state = self.trainer.args, self.trainer.state
        best, limit = state.best_model_checkpoint, args.save_total_limit
        # A best checkpoint is verified when it is loaded.
        if best is not None and not args.load_best_model_at_end and not is_whole(Path(best)):
            logger.warning("%s, the best checkpoint, is damaged or gone: all others stay", best)
            state.best_model_checkpoint = None
        if is_preempted:
            args.save_total_limit = None
        try:
            yield
        finally:
            args.save_total_limit = limit

    # -- parts -------------------------------------------------------------------------------------------------

    def _write_blocks(self, folder: Path) -> None:
        model, tokenizer = self.trainer.model, self.trainer.processing_class
        deltas = self.engine.read_blocks(model, self.trainer.optimizer)

        def write() -> None:
            write_blocks_of(model, folder, deltas, card=self._card_lines())
            if tokenizer is not None:
                save_tokenizer(tokenizer, folder)

        self._write_on_one_rank(write, deltas, folder)

    def _write_optimizer(self, folder: Path) -> None:
        model = self.trainer.model
        moments = self.engine.read_moments(model, self.trainer.optimizer)

        def write() -> None:
            shapes = {name: delta_shape(model.smt.selection, name) for name in sparse_layers(model)}
            save_moments(folder, shapes, moments)
            rows, multipliers = global_batch_size(self.trainer.args), group_multipliers(model)
            save_schedule(folder, self.trainer.lr_scheduler.state_dict(), rows, multipliers)

        self._write_on_one_rank(write, moments.tensors, folder)

    def _write_random_states(self, folder: Path) -> None:
        # One rank writes all files: what it measures for the manifest can't lag behind on a network's file system.
        states = gather_objects(random_state())
        self._write_on_one_rank(lambda: save_random_states(folder, states), (), folder)

    def _card_lines(self) -> str:
        args = self.trainer.args
        return (
            f"\nTrained for {self.trainer.state.global_step} steps, learning rate {args.learning_rate:g}, base in "
            f"{args.dtype}.\n"
        )

    @contextmanager
    def _saving(self, folder: Path) -> Iterator[Path]:
        """Yield a folder to write into, which becomes ``folder`` on all ranks or none."""
        save = Save(folder)

        def begin() -> None:
            remove_leftovers(self.trainer.args.output_dir)
            save.begin()

        try:
            self._write_on_one_rank(begin, (), folder)
            yield save.folder
            self._write_on_one_rank(save.commit, (), folder)
        finally:
            save.close()

    def _write_on_one_rank(self, write: Callable[[], object], tensors: Iterable[Any], folder: Path) -> None:
        """Run ``write``, which reads ``tensors``, on the writing rank; all fail if it fails.

        Reading is collective: ranks that don't write read too, and so does one whose writing failed.
        """

        def result() -> None:
            if isinstance(failure, OSError):
                reason = failure.strerror or failure
                raise SMTError(f"{folder}: can't be written ({reason}); what was saved before is untouched")
            if failure is not None:
                raise failure

        failure: OSError | SMTError | None = None
        if self.trainer.args.should_save:
            try:
                write()
            except (OSError, SMTError) as error:
                failure = error
        deque(tensors, maxlen=0)  # keeps none, not even while the next is read
        raise_on_any_rank(result, "saving")


def global_batch_size(args: SMTTrainingArguments) -> int:
    """Count the rows of a global step."""
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * get_world_size()
