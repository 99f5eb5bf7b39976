"""Name what this rank is doing, for messages about lost ranks."""

from __future__ import annotations

from collections.abc import Callable

_current = "start"
_listeners: list[Callable[[str], None]] = []


def begin_activity(name: str) -> None:
    """Note what this rank does from now on: ``"load"``, ``"training, step 3: forward"``."""
    global _current
    _current = name
    for listener in _listeners:
        listener(name)


def current_activity() -> str:
    """Return the name that :func:`begin_activity` was last given."""
    return _current


def on_activity(listener: Callable[[str], None]) -> None:
    """Call ``listener`` with each activity's name as it begins."""
    _listeners.append(listener)
