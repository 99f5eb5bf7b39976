"""Define ``SMTError``, the exception for wrong input as opposed to a defect of the program."""

from __future__ import annotations

from importlib.util import find_spec

MAX_REASON = 300  # characters of another library's message
MAX_MESSAGE = 2000  # characters; paths can be long


class SMTError(ValueError):
    """Report user input that can't be used.

    Such input is a config, flag, data row, model, adapter or selection file. The message is one line that names the
    field or file and says what would be accepted. Command-line programs print it without a traceback and exit with
    code 2. Characters that can't be printed are escaped, so text quoted from a file can't break the line or send a
    control sequence to a terminal.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


def first_line(error: BaseException) -> str:
    """Return the first line of another library's exception, or its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:MAX_REASON]


def whole_message(error: BaseException) -> str:
    """Return another library's message as one line, or the exception's type if it is empty."""
    return " ".join(str(error).split())[:MAX_REASON] or type(error).__name__


def _one_line(message: str) -> str:
    """Escape characters that can't be printed, and cut a long message."""
    cut = message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


class RankError(SMTError):
    """Report an :class:`SMTError` that other ranks may not have, so each rank prints its own."""


def require_peft(flag: str) -> None:
    """Raise SMTError if PEFT isn't installed; ``flag`` is the flag that needs it."""
    _require("peft", "PEFT", "benchmark", flag)


def require_reasoning_gym(flag: str) -> None:
    """Raise SMTError if reasoning-gym isn't installed; ``flag`` is the flag that needs it."""
    _require("reasoning_gym", "reasoning-gym", "quickstart", flag)


def _require(module: str, name: str, extra: str, flag: str) -> None:
    if find_spec(module) is None:
        raise SMTError(f'{flag}: {name} is not installed; pip install "smt_dist[{extra}]"')
