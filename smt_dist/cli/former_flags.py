"""Accept former names of flags on the command line and in recipes."""

from __future__ import annotations

import re
from collections.abc import Iterable

from smt_dist.errors import SMTError

# Former name -> current name. A switch's --no_ form goes with it.
FORMER_FLAGS = {"picture": "selection_report"}
_FLAG = re.compile(r"--(no[_-])?([\w-]+)(=.*)?", re.DOTALL)


def rename_former_flags(words: list[str]) -> list[str]:
    """Replace former names of flags in a command line by their current names.

    Raises:
        SMTError: both names of a flag are given.
    """
    found = [_FLAG.fullmatch(word) for word in words]
    refuse_both_names((match[2].replace("-", "_") for match in found if match), dashes="--")
    return [
        f"--{'no_' if match[1] else ''}{FORMER_FLAGS[match[2]]}{match[3] or ''}"
        if match and match[2] in FORMER_FLAGS
        else word
        for word, match in zip(words, found, strict=True)
    ]


def refuse_both_names(names: Iterable[str], source: str = "", dashes: str = "") -> None:
    """Raise SMTError where a former name stands beside the current one.

    Args:
        names: as given, without dashes.
        source: what begins the message.
        dashes: what both names begin with in the message.
    """
    given = set(names)
    for former, current in FORMER_FLAGS.items():
        if {former, current} <= given:
            names_of_one = f"{dashes}{former} and {dashes}{current} are two names of one flag"
            raise SMTError(f"{source}{names_of_one}: give one of them")
