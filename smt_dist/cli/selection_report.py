"""Write a selection's report, and keep the scores it was chosen by."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smt_dist.distributed import get_rank, write_on_rank_zero
from smt_dist.errors import SMTError
from smt_dist.report import write_selection_report
from smt_dist.selection.block_scores import SCORES_FILE, BlockScores, belongs_to, load_scores, save_scores, scores_path
from smt_dist.sparse.blocks import BlockSelection
from smt_dist.training.run_arguments import RunArguments

logger = logging.getLogger(__name__)

PAGE_FILE = "selection.html"


def known_scores(run: RunArguments, output_dir: Path, selection: BlockSelection) -> BlockScores | None:
    """Read the scores of an earlier selection, for its report; None where there are none.

    They lie beside the selection's file, or in its run's folder.
    """
    if not run.selection_report:
        return None
    folder = Path(run.adapter) if run.adapter is not None else output_dir
    path = scores_path(run.selection) if run.selection is not None else folder / SCORES_FILE
    try:
        scores = load_scores(path) if path.is_file() else None
    except SMTError as error:  # a report isn't worth a run
        logger.warning("the selection's report goes without scores: %s", error)
        return None
    return scores if scores is not None and belongs_to(scores, selection) else None


def report_selection(
    run: RunArguments,
    page: Path,
    selection: BlockSelection,
    scores: BlockScores | None,
    log_history: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write the selection's report, where it is wanted, on rank 0."""
    if run.selection_report and get_rank() == 0:
        source = run.model_name_or_path or run.gguf_file or ""
        write_selection_report(page, selection, scores, log_history, {"model": Path(source).name})


def keep_scores(scores: BlockScores, path: Path) -> None:
    """Write the scores, for the report of a later run with this selection; collective.

    Raises:
        SMTError: they can't be written (a full disk); on all ranks.
    """

    def write() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_scores(scores, path)

    write_on_rank_zero(write, str(path), "writing the scores")
