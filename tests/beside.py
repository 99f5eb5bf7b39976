"""Tell tests that start ranks from others, which can run beside them.

Under ``pytest -n 2 --dist loadgroup`` one worker runs all files whose tests start ranks, one test after the other:
ranks take both cores of a small machine already, and they share a prepared parent and the folder of compiled ops. The
other worker runs the other files, each of them whole, for its module's fixtures.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

# A file that imports something of these starts ranks.
STARTS_RANKS = re.compile(r"^from (harness|two_nodes|faults\.fleet) import", re.MULTILINE)


@cache
def starts_ranks(path: Path) -> bool:
    """Tell whether the tests of a file start rank processes."""
    return bool(STARTS_RANKS.search(path.read_text()))


def make_scheduler(config: pytest.Config, log: object):
    """Make what hands files to pytest-xdist's workers, those that start ranks as one.

    Marks (``xdist_group``) would do the same, but pytest-xdist 3.8.0 loses them under pytest 9.2: issue 1386 there.
    """
    from xdist.scheduler import LoadScopeScheduling

    class RanksAndFiles(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return "ranks" if starts_ranks(config.rootpath / path) else path

    config.option.loadscopereorder = False  # as collected: ranks first, since they take longest
    return RanksAndFiles(config, log)
