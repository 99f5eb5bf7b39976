"""What this rank is doing, in words: for messages about ranks that are gone."""

from __future__ import annotations

from collections.abc import Callable

_current = "start"
_listeners: list[Callable[[str], None]] = []


def begin_activity(name: str) -> None:
    """Say what begins now: ``"load"``, ``"training, step 3: forward"``."""
    global _current
    _current = name
    for listener in _listeners:
        listener(name)


def current_activity() -> str:
    """What :func:`begin_activity` was last told."""
    return _current


def on_activity(listener: Callable[[str], None]) -> None:
    """Call ``listener`` with each activity's name as it begins."""
    _listeners.append(listener)
