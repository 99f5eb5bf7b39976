"""Define ``RunPlan``: what a run does, given flags, checkpoint, adapter and selection."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from smt_dist.checkpoint.adapter import CONFIG_FILE, SELECTION_FILE, Adapter, config_of, read_active, read_adapter
from smt_dist.checkpoint.atomic import VerifiedFolder
from smt_dist.checkpoint.moved_base import MOVED_BASE
from smt_dist.checkpoint.rotation import find_checkpoint
from smt_dist.config import SMTConfig
from smt_dist.distributed import assert_same_on_all_ranks, from_main_process, raise_on_any_rank
from smt_dist.errors import SMTError
from smt_dist.files import shorten
from smt_dist.sparse.blocks import BlockSelection
from smt_dist.training.run_arguments import RunArguments


@dataclass(frozen=True)
class RunPlan:
    """Decide what a run does.

    This is the only place where one source takes precedence over another.

    Attributes:
        run: the flags; the base is the one that the run trains.
        config: the checkpoint's, the file that is given, the adapter's, what a selection amounts to, the defaults.
        selection: made earlier: the checkpoint's, the adapter's or a file's; None: a warm-up makes it.
        adapter: whose values to go on from; None: blocks begin at zero, or are read by the trainer as it resumes.
        checkpoint: to resume from.
    """

    run: RunArguments
    config: SMTConfig
    selection: BlockSelection | None = None
    adapter: Adapter | None = None
    checkpoint: VerifiedFolder | None = None

    @classmethod
    def resolve(cls, run: RunArguments, output_dir: str = "", resume: str | bool | None = None) -> RunPlan:
        """Read what the flags name, and weigh it; collective, before anything is loaded.

        Args:
            run: the flags.
            output_dir: where checkpoints are.
            resume: ``--resume_from_checkpoint``.

        Raises:
            SMTError: on all ranks: something can't be read, or contradicts something else.
            RuntimeError: the ranks have read different selections.
        """
        checkpoint = find_checkpoint(resume, output_dir)
        selection, adapter = raise_on_any_rank(lambda: _find_selection(run, checkpoint), "the selection")
        if selection is not None:
            assert_same_on_all_ranks(selection.to_json().encode(), "the block selection")
        config = raise_on_any_rank(lambda: _find_config(run, selection, adapter, checkpoint), "the SMT config")
        return cls(_on_moved_base(run, config, checkpoint), config, selection, adapter, checkpoint)

    @property
    def adapter_source(self) -> str:
        """Return the adapter's name for errors."""
        return str(self.checkpoint) if self.checkpoint is not None else f"--adapter {self.run.adapter}"


def _find_selection(
    run: RunArguments, checkpoint: VerifiedFolder | None
) -> tuple[BlockSelection | None, Adapter | None]:
    if checkpoint is not None:
        selection = BlockSelection.from_json_file(checkpoint.folder / SELECTION_FILE)
        # After a re-selection the frozen blocks' values have to be restored, too.
        reselected = read_active(checkpoint.folder, selection) is not None
        return selection, read_adapter(checkpoint) if reselected else None
    if run.adapter is not None:
        adapter = read_adapter(run.adapter)
        return adapter.trained, adapter
    return (BlockSelection.from_json_file(run.selection), None) if run.selection is not None else (None, None)


def _find_config(
    run: RunArguments, selection: BlockSelection | None, adapter: Adapter | None, checkpoint: VerifiedFolder | None
) -> SMTConfig:
    given = SMTConfig.from_flag(run.smt_config) if run.smt_config is not None else None
    if checkpoint is not None:
        config = SMTConfig.from_json_file(checkpoint.folder / CONFIG_FILE)
        if given is None:
            return config
        changed = given.first_difference(config.model_copy(update={"non_finite": given.non_finite, "form": given.form}))
        if changed is not None:
            raise SMTError(
                f"--smt_config: {_shown(run.smt_config)} isn't the config that {checkpoint} was trained with: "
                f"{changed}; leave the flag out, and the checkpoint's is used"
            )
        return given
    if given is None and adapter is not None:
        return adapter.config
    if given is None:
        return config_of(selection)
    if adapter is not None and given.warmup.mode != adapter.config.warmup.mode:
        raise SMTError(f"--smt_config: {_shown(run.smt_config)}: warmup.mode isn't that of {run.adapter}")
    if run.selection is not None and given.warmup.mode == "full_ft":
        raise SMTError("--selection: no warm-up runs then, so warmup.mode can't be full_ft; set it to scoring")
    return given


def _shown(smt_config: str | dict[str, Any]) -> str:
    """Name a config's file, or quote the beginning of what was given itself."""
    text = str(smt_config)
    return shorten(text) if text.lstrip().startswith("{") else text


def _on_moved_base(run: RunArguments, config: SMTConfig, checkpoint: VerifiedFolder | None) -> RunArguments:
    """Set the flags to the base that a full fine-tuning warm-up changed, where there is one.

    The checkpoint's blocks belong to it.
    """
    if checkpoint is None or config.warmup.mode != "full_ft":
        return run
    moved: Path = checkpoint.folder.parent / MOVED_BASE
    # A run that continued an adapter was given the moved base.
    there = from_main_process(moved.is_dir, "the moved base")
    return replace(run, model_name_or_path=str(moved), gguf_file=None) if there else run
