"""Check fields that are one of a few values, where no command line has done it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from smt_dist.errors import SMTError


def check_choices(arguments: Any) -> None:
    """Refuse a value that its field's ``Literal`` doesn't name; Python itself takes any.

    Args:
        arguments: an object of a dataclass whose fields are flags.

    Raises:
        SMTError: the first such field, with what it accepts.
    """
    hints = get_type_hints(type(arguments))
    for name in (field.name for field in fields(arguments)):
        value, accepted = getattr(arguments, name), get_args(hints[name])
        if get_origin(hints[name]) is Literal and value not in accepted:
            raise SMTError(f"--{name}: {value!r} is not one of {', '.join(accepted)}")
