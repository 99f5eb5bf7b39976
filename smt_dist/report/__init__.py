"""Write the report of a selection: an HTML page for a browser, and PNG files for papers."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smt_dist.selection.block_scores import BlockScores
from smt_dist.sparse.blocks import BlockSelection

logger = logging.getLogger(__name__)


def write_selection_report(
    page: Path,
    selection: BlockSelection,
    scores: BlockScores | None = None,
    log_history: Sequence[Mapping[str, Any]] = (),
    facts: Mapping[str, str] | None = None,
) -> bool:
    """Write the HTML page and, beside it, two PNG files.

    These are ``<stem>.png`` (shares, distribution, curve) and ``<stem>_blocks.png`` (maps). The function never raises:
    a failed report must not end a run, so errors are logged in one line. Call it on one rank.

    Args:
        page: the HTML file.
        selection: the chosen blocks.
        scores: the scores of the blocks; without them the maps show the chosen blocks only.
        log_history: Trainer's ``log_history``, for the learning curve.
        facts: more rows for the page's table, such as the model's name.

    Returns:
        Whether the report was written.
    """
    # Imported here, because plotly and matplotlib are an optional extra and slow to load.
    try:
        from smt_dist.report.page import write_page
        from smt_dist.report.paper import write_png
    except ImportError as error:
        logger.info('%s was not written: %s; pip install "smt_dist[plots]"', page.name, error)
        return False
    from smt_dist.report.summary import summarise

    try:
        summary = summarise(selection, scores, log_history, facts or {})
        page.parent.mkdir(parents=True, exist_ok=True)
        write_page(page, summary)
        write_png(page, summary)
    except Exception as error:  # plotting libraries raise any type, and training must go on
        logger.warning("%s was not written: %s: %s", page, type(error).__name__, error)
        return False
    return True
