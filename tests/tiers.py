"""The two tiers: `tests/run.sh` runs what isn't marked ``slow``, `tests/run.sh --all` everything.

A matrix marks the runs that the default tier leaves out, and its fixture launches no more than the tests ask for:

    each_run = pytest.mark.parametrize("run", slow_unless(RUNS, lambda run: run.world_size == 2), ids=str)

    @pytest.fixture(scope="module")
    def found(request):
        return launch(..., runs=chosen(request, "run"))
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

slow = pytest.mark.slow
Check = Callable[[str], AbstractContextManager[None]]


def slow_unless(values: Iterable[Any], is_quick: Callable[[Any], bool]) -> list[Any]:
    """Mark the parameters that the default tier leaves out; a tuple is one value."""
    return [value if is_quick(value) else pytest.param(value, marks=slow) for value in values]


def slow_rows_unless(rows: Iterable[tuple], is_quick: Callable[..., bool]) -> list[Any]:
    """Mark the rows of several parameters each that the default tier leaves out."""
    return [row if is_quick(*row) else pytest.param(*row, marks=slow) for row in rows]


def chosen(request: pytest.FixtureRequest, *names: str) -> list[Any]:
    """List a parameter's values among this module's collected tests, in order, each once.

    Several names give tuples, of the tests that have all of them. Tests that ``-m`` or ``-k`` left out don't count.
    """
    found: dict[Any, None] = {}
    for item in request.session.items:
        parameters = item.callspec.params if hasattr(item, "callspec") else {}
        if item.module is request.module and set(names) <= set(parameters):
            values = tuple(parameters[name] for name in names)
            found[values if len(names) > 1 else values[0]] = None
    return list(found)


def engines_of(runs: Iterable[tuple[int, str]]) -> dict[int, list[str]]:
    """Sort (world size, engine) pairs by world size, as ``launch_engines`` takes them."""
    engines: dict[int, list[str]] = {}
    for world_size, engine in runs:
        engines.setdefault(world_size, []).append(engine)
    return engines


def asks_for(request: pytest.FixtureRequest, *tests: str) -> bool:
    """Say whether one of these tests of this module was collected."""
    own = (item for item in request.session.items if item.module is request.module)
    return any(item.originalname in tests for item in own)


def in_default_tier(test: Callable) -> bool:
    """Say whether the default tier runs the test, with one value of each parameter at least."""
    marks = _marks(test)
    return not any(mark.name == "slow" for mark in marks) and all(
        _quick(mark) for mark in marks if mark.name == "parametrize"
    )


def quick_values(test: Callable, names: str | tuple[str, ...]) -> list[Any]:
    """List a parameter's values in the default tier, or those of several given together."""
    (parameter,) = [mark for mark in _marks(test) if mark.name == "parametrize" and mark.args[0] == names]
    return _quick(parameter) if in_default_tier(test) else []


def _marks(test: Callable) -> list[pytest.Mark]:
    of_module = getattr(sys.modules[test.__module__], "pytestmark", [])
    decorators = [*(of_module if isinstance(of_module, list) else [of_module]), *getattr(test, "pytestmark", [])]
    return [getattr(decorator, "mark", decorator) for decorator in decorators]


def _quick(parametrize: pytest.Mark) -> list[Any]:
    found = []
    for value in parametrize.args[1]:
        if not hasattr(value, "marks"):
            found.append(value)
        elif not any(mark.name == "slow" for mark in value.marks):
            found.append(value.values[0] if len(value.values) == 1 else value.values)
    return found


@contextmanager
def all_differences() -> Iterator[Check]:
    """List all that differs in one failure, instead of stopping at the first.

    with all_differences() as check, check("the losses"):
        assert losses == expected
    """
    differences: list[str] = []

    @contextmanager
    def check(what: str) -> Iterator[None]:
        try:
            yield
        except AssertionError as error:
            lines = [line[:200] for line in str(error).splitlines()[:8]]
            differences.append("\n    ".join([what, *lines]))

    yield check
    assert not differences, "\n".join([f"differences: {len(differences)}", *differences])
