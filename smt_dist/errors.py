"""The one exception that means "the input is wrong", as opposed to "the program is wrong"."""

from __future__ import annotations

from importlib.util import find_spec

MAX_REASON = 300  # characters of another library's message
MAX_MESSAGE = 2000  # characters; paths may be long


class SMTError(ValueError):
    """Something that the user gave (a config, flag, data row, model, adapter or selection file) can't be used.

    The message is one line that names the field or file and says what would be accepted. Command-line
    programs print it without a traceback and exit with code 2. What it quotes from a file can't break the line, nor
    reach a terminal as a control sequence: characters that can't be printed are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(_one_line(message))


def first_line(error: BaseException) -> str:
    """What another library's exception says, in one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:MAX_REASON]


def whole_message(error: BaseException) -> str:
    """What another library's exception says over several lines, in one."""
    return " ".join(str(error).split())[:MAX_REASON] or type(error).__name__


def _one_line(message: str) -> str:
    """Escape what can't be printed, keep the rest; cut where it gets long."""
    cut = message if len(message) <= MAX_MESSAGE else f"{message[:MAX_MESSAGE]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)


class RankError(SMTError):
    """An :class:`SMTError` that perhaps only this rank has seen: each rank that has it prints it."""


def require_peft(flag: str) -> None:
    """Raise SMTError where PEFT isn't installed; ``flag`` is what asks for it."""
    _require("peft", "PEFT", "benchmark", flag)


def require_reasoning_gym(flag: str) -> None:
    """Raise SMTError where reasoning-gym isn't installed; ``flag`` is what asks for it."""
    _require("reasoning_gym", "reasoning-gym", "quickstart", flag)


def _require(module: str, name: str, extra: str, flag: str) -> None:
    if find_spec(module) is None:
        raise SMTError(f'{flag}: {name} is not installed; pip install "smt_dist[{extra}]"')
