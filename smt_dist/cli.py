"""What the programs in ``launch/`` share: one-line errors and exit codes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from smt_dist.errors import SMTError


def run_program(main: Callable[[], None]) -> None:
    """Run ``main``; turn an :class:`SMTError` into one line on stderr and exit code 2.

    Every rank exits with 2, but only one prints: rank 0. All ranks of a job see the same error
    (see :func:`smt_dist.distributed.agree`), so nothing is hidden.
    """
    try:
        main()
    except SMTError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr, flush=True)
        _leave_process_group()
        sys.exit(2)
    _leave_process_group()


def _leave_process_group() -> None:
    # Imported late: `--help` should not wait for torch.
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
