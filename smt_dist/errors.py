"""The one exception that means "the input is wrong", as opposed to "the program is wrong"."""


class SMTError(ValueError):
    """Something that the user gave (a config, flag, data row, model, adapter or selection file) can't be used.

    The message is one line that names the field or file and says what would be accepted. Command-line
    programs print it without a traceback and exit with code 2.
    """


class RankError(SMTError):
    """An :class:`SMTError` that perhaps only this rank has seen: each rank that has it prints it."""
