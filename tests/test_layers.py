"""Imports go down the list of rooms, in no circle, and never to what isn't shipped."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the top down; a room may import from itself and from those below it.
ROOMS = [
    *("smt_dist.cli", "smt_dist.memory.record", "smt_dist.memory.plan", "smt_dist.training", "smt_dist.report"),
    "smt_dist",  # the face: what `import smt_dist` offers
    *("smt_dist.selection", "smt_dist.checkpoint", "smt_dist.fault_tolerance", "smt_dist.engines", "smt_dist.sparse"),
    *("smt_dist.models", "smt_dist.evaluation", "smt_dist.data"),
    *("smt_dist.config", "smt_dist.distributed", "smt_dist.files", "smt_dist.errors"),
]
Imports = dict[str, set[str]]


def read_imports(root: Path) -> Imports:
    """Module -> the modules that it imports anywhere in its code, of those below ``root`` and its benchmarks."""
    benchmarks = root / "launch" / "benchmarks"
    files = {name_of(path, root): path for path in (root / "smt_dist").rglob("*.py")}
    files |= {name_of(path, benchmarks): path for path in benchmarks.rglob("*.py")}
    return {
        name: {found for found in _imported(ast.parse(path.read_text()), files) if found != name}
        for name, path in files.items()
    }


def name_of(path: Path, base: Path) -> str:
    return ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")


def _imported(tree: ast.AST, files: dict[str, Path]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from names & files.keys() or {node.module} & files.keys()


def room_of(module: str) -> str | None:
    """The most precise of the rooms in which a module lies; None for what isn't in the package."""
    return max((room for room in ROOMS if f"{module}.".startswith(f"{room}.")), key=len, default=None)


def faults(imports: Imports) -> list[str]:
    """What goes up, what leaves the package, and the first circle."""
    found = []
    for module, targets in sorted(imports.items()):
        for target in sorted(targets) if room_of(module) else ():
            if room_of(target) is None:
                found.append(f"{module} imports {target}, which isn't shipped")
            elif ROOMS.index(room_of(target)) < ROOMS.index(room_of(module)):
                found.append(f"{module} imports {target}, which lies higher")
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        found.append("a circle: " + " -> ".join(error.args[1]))
    return found


def test_imports_go_down():
    imports = read_imports(ROOT)
    assert len(imports) > 100
    assert "smt_dist.errors" in imports["smt_dist.files"]
    assert {room_of(module) for module in imports} == {*ROOMS, None}
    assert faults(imports) == []


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        ({"smt_dist/sparse/a.py": "from smt_dist.training import b", "smt_dist/training/b.py": ""}, "lies higher"),
        ({"smt_dist/files.py": "def f():\n    import smt_dist", "smt_dist/__init__.py": ""}, "lies higher"),
        ({"smt_dist/cli/a.py": "import step", "launch/benchmarks/step.py": ""}, "isn't shipped"),
        ({f"smt_dist/cli/{a}.py": f"from smt_dist.cli.{b} import x" for a, b in pairwise("aba")}, "a circle"),
    ],
)
def test_a_fault_is_found(tmp_path, files, fault):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    (found,) = faults(read_imports(tmp_path))
    assert fault in found
