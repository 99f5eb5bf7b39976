"""Packages that only some programs need: a clear word where one isn't installed."""

from __future__ import annotations

from importlib.util import find_spec

from smt_dist.errors import SMTError


def require_peft(flag: str) -> None:
    """Raise SMTError where PEFT isn't installed; ``flag`` is what asks for it."""
    _require("peft", "PEFT", "benchmark", flag)


def require_reasoning_gym(flag: str) -> None:
    """Raise SMTError where reasoning-gym isn't installed; ``flag`` is what asks for it."""
    _require("reasoning_gym", "reasoning-gym", "quickstart", flag)


def _require(module: str, name: str, extra: str, flag: str) -> None:
    if find_spec(module) is None:
        raise SMTError(f'{flag}: {name} is not installed; pip install "smt_dist[{extra}]"')
