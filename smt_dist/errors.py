"""The one exception that means "the input is wrong", as opposed to "the program is wrong"."""

MAX_REASON = 300  # characters


class SMTError(ValueError):
    """Something that the user gave (a config, flag, data row, model, adapter or selection file) can't be used.

    The message is one line that names the field or file and says what would be accepted. Command-line
    programs print it without a traceback and exit with code 2.
    """


def first_line(error: BaseException) -> str:
    """What another library's exception says, in one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:MAX_REASON]


class RankError(SMTError):
    """An :class:`SMTError` that perhaps only this rank has seen: each rank that has it prints it."""
