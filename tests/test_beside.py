"""Which tests may run beside others is told from what their files import."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from beside import make_scheduler, starts_ranks

TESTS = Path(__file__).parent
STARTERS = {"harness", "two_nodes", "faults.fleet"}


def imported(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it and in whichever way."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def test_no_file_that_starts_ranks_is_taken_for_another():
    """Two launches at once take each other's locks away, and may time out on two cores."""
    files = sorted(TESTS.rglob("test_*.py"))
    assert {path.name for path in files if STARTERS & imported(path)} == {p.name for p in files if starts_ranks(p)}


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        ("tests/test_guards.py::test_a[x::y]", "ranks"),
        ("tests/faults/test_faults.py::test_b", "ranks"),
        ("tests/test_config.py::test_c", "tests/test_config.py"),
    ],
)
def test_files_that_start_ranks_are_one_group_and_others_one_each(name, scope, monkeypatch, pytestconfig):
    """In another order or by pieces, both workers would make a module's fixtures."""
    monkeypatch.setattr(pytestconfig.option, "tx", ["2*popen"])
    monkeypatch.setattr(pytestconfig.option, "loadscopereorder", True)
    scheduler = make_scheduler(pytestconfig, None)
    assert scheduler._split_scope(name) == scope
    assert not pytestconfig.option.loadscopereorder
