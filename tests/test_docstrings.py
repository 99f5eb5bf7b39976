"""The first line of every docstring is short and says what a function does, in the imperative."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "smt_dist"
LONGEST = 90
# With which descriptions begin, and no imperative.
NO_VERBS = frozenset(
    [
        *("A", "After", "All", "An", "And", "As", "At", "Before", "Beside", "Both", "Each", "Every", "For", "From"),
        *("How", "If", "In", "Its", "No", "Nothing", "Of", "On", "One", "Only", "Or", "Over", "Some", "That", "The"),
        *("These", "This", "Those", "Under", "W0", "What", "When", "Where", "Whether", "Which", "Who", "Why", "With"),
        "Without",
    ]
)


def docstrings() -> Iterator[tuple[str, str]]:
    """(place, docstring) of every module, class and function of the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text:
                    line = getattr(node, "lineno", 1)
                    yield f"{path.relative_to(ROOT)}:{line}", text


def first_lines() -> list[tuple[str, str]]:
    return [(place, text.splitlines()[0]) for place, text in docstrings()]


def test_every_first_line_fits_into_a_list() -> None:
    """An index of names shows it: what doesn't fit is a second paragraph's."""
    assert not [f"{place}: {len(line)}: {line}" for place, line in first_lines() if len(line) > LONGEST]


def test_every_first_line_is_a_paragraph() -> None:
    texts = [(place, text.splitlines()) for place, text in docstrings()]
    assert not [place for place, lines in texts if len(lines) > 1 and lines[1].strip()]
    assert not [place for place, lines in texts if not lines[0].endswith(".")]


def is_imperative(line: str) -> bool:
    """Whether a line may begin with an imperative: capitalised, of a kind that isn't on the list, no third person."""
    word = line.split()[0].strip(",.:;")
    third_person = word.endswith("s") and not word.endswith("ss")
    return word[0].isupper() and word not in NO_VERBS and not third_person


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Return the blocks.", True),
        ("Pass the verdict on.", True),
        ("The blocks.", False),
        ("``delta`` and more.", False),
        ("Returns the blocks.", False),
        ("Whether it fits.", False),
    ],
)
def test_what_counts_as_an_imperative(line: str, expected: bool) -> None:
    assert is_imperative(line) is expected


def test_every_first_line_begins_with_a_verb() -> None:
    assert not [f"{place}: {line}" for place, line in first_lines() if not is_imperative(line)]
