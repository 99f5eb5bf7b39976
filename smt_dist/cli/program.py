"""Provide one-line errors, exit codes and flag types for all programs."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from smt_dist.errors import RankError, SMTError
from smt_dist.fault_tolerance.preemption import Preempted
from smt_dist.fault_tolerance.process_end import let_threads_settle
from smt_dist.fault_tolerance.supervision import await_explanation, end_supervision


def run_program(main: Callable[[], None]) -> None:
    """Run ``main``; turn an :class:`SMTError` into one line on stderr and exit code 2.

    Every rank exits with 2, but only rank 0 prints, since all ranks see the same error (see
    :func:`smt_dist.distributed.raise_on_any_rank`); a :class:`RankError`, which one rank may have alone, is printed by
    each. Ends what :func:`smt_dist.fault_tolerance.supervision.supervise` began: whichever way a rank ends, the others
    are told.
    """
    try:
        main()
    except Preempted as error:
        _print_line(error.text)
        end_supervision(error)
        raise
    except SMTError as error:
        alone = isinstance(error, RankError)
        if alone:  # what looks like a bad file may be another rank's end, in a library's collective
            await_explanation()
        if alone or int(os.environ.get("RANK", "0")) == 0:
            _print_line(str(error), error=True)
        end_supervision(error)
        _leave_process_group()
        sys.exit(2)
    except (Exception, KeyboardInterrupt) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if full:  # by what isn't a save (a log, a cache); only this rank knows
            _print_line(f"{error.filename or 'a file'}: can't be written ({error.strerror})", error=True)
        end_supervision(error)
        if not full:
            raise
        sys.exit(2)
    else:
        _leave_process_group()
        end_supervision()
    finally:
        if "torch" in sys.modules:  # a bad flag should not wait
            let_threads_settle()


def _print_line(text: str, error: bool = False) -> None:
    """Print a line on stderr that begins with the program's name.

    Ranks other than 0 also print their number.
    """
    rank = int(os.environ.get("RANK", "0"))
    parts = [os.path.basename(sys.argv[0]), *(["error"] if error else []), *([f"rank {rank}"] if rank else []), text]
    print(": ".join(parts), file=sys.stderr, flush=True)


def _leave_process_group() -> None:
    # Imported late: `--help` should not wait for torch.
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def parse_arguments(kind: type, description: str | None) -> tuple[Any, Any]:
    """Parse recipe and command line into ``kind`` and training arguments; set up logging.

    Raises:
        SMTError: a flag is unknown or has a bad value; names it.
    """
    from transformers import HfArgumentParser

    from smt_dist.cli.former_flags import rename_former_flags
    from smt_dist.cli.recipe import SUFFIXES, expand_recipe
    from smt_dist.training.arguments import SMTTrainingArguments

    kinds = [kind, SMTTrainingArguments]
    parser = HfArgumentParser(kinds, description=description, allow_abbrev=False)
    parser.formatter_class = HelpFormatter
    parser.error = raise_usage_error
    configure_logging()
    words = expand_recipe(rename_former_flags(sys.argv[1:]), parser, kinds)
    own, training, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    if unknown:
        hint = "; a recipe comes before the flags" if unknown[-1].endswith(SUFFIXES) else ""
        raise_usage_error(f"unknown flag or value: {' '.join(unknown)}{hint}")
    return own, training


def configure_logging() -> None:
    """Log INFO of this package on rank 0, warnings elsewhere."""
    rank = int(os.environ.get("RANK", "0"))
    logging.basicConfig(format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S", level=logging.WARNING)
    # DeepSpeed 0.19.8 calls collectives by names that torch 2.13 deprecates, at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    logging.getLogger("smt_dist").setLevel(logging.INFO if rank == 0 else logging.ERROR)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the description's line breaks and add defaults."""


def raise_usage_error(message: str) -> NoReturn:
    """Raise SMTError in place of argparse's usage message; for ``ArgumentParser.error``."""
    message = re.sub(r"^argument (--\w+)\S*: ", r"\1: ", message)
    if choice := re.fullmatch(r"(.*)invalid choice: (.*) \(choose from (.*)\)", message, re.DOTALL):
        accepted = choice[3].replace("'", "")
        message = f"{choice[1]}{choice[2]} is not one of {accepted}"
    raise SMTError(f"{message} (see --help)")


def positive_int(text: str) -> int:
    """Parse a whole number from 1 on; an argparse type."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def natural(text: str) -> int:
    """Parse a whole number from 0 on; an argparse type."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, not {value}")
    return value


def check_writable(flag: str, path: Path) -> None:
    """Check that the folder ``path`` can be made, before the work starts.

    Raises SMTError with the flag.
    """
    nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise SMTError(f"{flag}: {path}: {nearest} is {'not writable' if nearest.is_dir() else 'not a folder'}")
