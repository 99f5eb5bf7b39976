"""The report of a selection: a page to look at in a browser, and PNG files for papers."""

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
    """Write the page, and beside it ``<stem>.png`` (shares, distribution, curve) and ``<stem>_blocks.png`` (maps).

    Never fails: a run is worth more than its report. What is wrong is logged in one line. Call it on one rank.

    Args:
        page: the HTML file.
        selection: the chosen blocks.
        scores: what they were chosen by; without them the maps show the chosen blocks only.
        log_history: Trainer's, for the learning curve.
        facts: more lines for the page's table, such as the model's name.

    Returns:
        Whether it was written.
    """
    # Imported here, and these import plotly and matplotlib: an optional extra, and slow to load.
    try:
        from smt_dist.report.page import write_page
        from smt_dist.report.paper import write_png
    except ImportError as error:
        logger.info('no %s: %s; pip install "smt_dist[plots]"', page.name, error)
        return False
    from smt_dist.report.summary import summarise

    try:
        summary = summarise(selection, scores, log_history, facts or {})
        page.parent.mkdir(parents=True, exist_ok=True)
        write_page(page, summary)
        write_png(page, summary)
    except Exception as error:  # whatever a plotting library may raise, training goes on
        logger.warning("%s was not written: %s: %s", page, type(error).__name__, error)
        return False
    return True
