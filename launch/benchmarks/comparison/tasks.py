"""Rows to train on, to tune on and to test on: three sets that share no question, in the project's own formats."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from smt_dist.data.rows import Rows, check_rows, read_rows
from smt_dist.errors import SMTError, require_reasoning_gym
from smt_dist.evaluation import make_items
from smt_dist.files import replace_file, shorten

Row = dict[str, Any]

# What reasoning-gym draws; each answer is one whole number.
GYM_TASKS: dict[str, dict[str, int]] = {
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "products": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "gcd": {"min_numbers": 2, "max_numbers": 2, "min_value": 1, "max_value": 200},
}
FOLDER_TASK = "math"
TASKS = (*GYM_TASKS, FOLDER_TASK)
SPLITS = ("train", "validation", "held_out", "test")
DRAWS = 20  # for each question that is wanted, until there are said to be too few


@dataclass(frozen=True)
class Counts:
    """Rows of each set. ``train`` None: all that are left (a folder's)."""

    train: int | None = 5000
    validation: int = 500
    test: int = 1000


@dataclass(frozen=True)
class Data:
    """A comparison's files.

    Attributes:
        files: split -> JSON file. ``held_out``: rows for the test loss; ``test``: questions to answer.
        rows: split -> number of rows.
        digests: split -> SHA-256 of the file.
    """

    files: dict[str, Path]
    rows: dict[str, int]
    digests: dict[str, str]


def prepare(task: str, source: Path | None, counts: Counts, seed: int, folder: Path) -> Data:
    """Make the sets, check that they are disjoint, and write them to ``folder`` where they aren't there yet.

    Args:
        task: one of :data:`TASKS`.
        source: the folder of ``math``: ``train.json``, and ``test.json`` or ``test/*.json``.
        counts: rows of each set.
        seed: of the draws, or of the split.
        folder: of the files.

    Raises:
        SMTError: an unknown task, no source where one is needed (or the other way round), an empty set, too few rows or
            questions, or a question in two sets.
    """
    if task not in TASKS:
        raise SMTError(f"--task: {task!r} is not one of {', '.join(TASKS)}")
    if (task == FOLDER_TASK) != (source is not None):
        why = "needs --data_folder" if source is None else "is drawn, so it takes no --data_folder"
        raise SMTError(f"--task {task}: {why}")
    sets = split_folder(source, counts, seed) if source is not None else draw(task, counts, seed)
    refuse_overlap(sets)
    for split, rows in sets.items():
        check_rows(_rows(rows, f"{task}, {split}")) if split != "test" else make_items(_rows(rows, f"{task}, {split}"))
    folder.mkdir(parents=True, exist_ok=True)
    files, digests = {}, {}
    for split in SPLITS:
        text = json.dumps(sets[split], indent=1, ensure_ascii=False) + "\n"
        digests[split] = hashlib.sha256(text.encode()).hexdigest()
        files[split] = folder / f"{task}_{split}_{digests[split][:12]}.json"
        if not files[split].exists():
            replace_file(files[split], lambda path, text=text: path.write_text(text, encoding="utf-8"))
    return Data(files, {split: len(rows) for split, rows in sets.items()}, digests)


def draw(task: str, counts: Counts, seed: int) -> dict[str, list[Row]]:
    """Different questions of one of reasoning-gym's kinds, test first. Raises SMTError where it hasn't as many."""
    require_reasoning_gym(f"--task {task}")
    import reasoning_gym

    train = counts.train or Counts.train
    sizes = {"test": counts.test, "validation": counts.validation, "train": train}
    wanted = sum(sizes.values())
    drawn = reasoning_gym.create_dataset(task, seed=seed, size=DRAWS * wanted, **GYM_TASKS[task])
    rows = list(islice(_distinct(_as_row(item) for item in drawn), wanted))
    if len(rows) < wanted:
        raise SMTError(f"--task {task}: has {len(rows):,} different questions, {wanted:,} are wanted: take fewer")
    stream = iter(rows)
    sets = {split: list(islice(stream, size)) for split, size in sizes.items()}
    return {**sets, "held_out": sets["test"][: counts.validation]}  # a loss takes fewer rows than an accuracy


def split_folder(source: Path, counts: Counts, seed: int) -> dict[str, list[Row]]:
    """A folder's rows: train, validation and held-out rows of its train file, and its test files' questions.

    The test loss is that of the held-out rows: a test file's solutions may be anything, its answers are exact.
    """
    if not source.is_dir():
        raise SMTError(f"--data_folder {source}: no such folder")
    single = source / "test.json"
    test_files = [single] if single.is_file() else sorted((source / "test").glob("*.json"))
    if not test_files:
        raise SMTError(f"--data_folder {source}: has neither test.json nor test/*.json")
    test = [{**row, "task": path.stem} for path in test_files for row in _distinct(read_rows(path).rows)]
    known = list(_distinct(read_rows(source / "train.json").rows))
    generator = random.Random(seed)
    generator.shuffle(test)
    generator.shuffle(known)
    rest = known[2 * counts.validation :]
    least = counts.train or 1
    if len(rest) < least:
        raise SMTError(
            f"--data_folder {source}: its train.json has {len(known):,} different questions: too few for 2 x "
            f"{counts.validation:,} validation and held-out rows and {least:,} to train on"
        )
    return {
        "train": rest[: counts.train],
        "validation": known[: counts.validation],
        "held_out": known[counts.validation : 2 * counts.validation],
        "test": list(_distinct(test))[: counts.test],
    }


def refuse_overlap(sets: Mapping[str, Iterable[Row]]) -> None:
    """Raise SMTError for a question that stands in two sets; ``held_out`` may hold the test set's own rows."""
    owner: dict[str, str] = {}
    for split in ("test", "validation", "train"):
        for row in sets[split]:
            _claim(owner, split, row)
    own = {id(row) for row in sets["test"]}
    for row in sets["held_out"]:
        if id(row) not in own:
            _claim(owner, "held_out", row)


def _claim(owner: dict[str, str], split: str, row: Row) -> None:
    found = owner.setdefault(question(row), split)
    if found != split:
        raise SMTError(f"a question of the {found} set is in the {split} set too: {shorten(question(row))!r}")


def question(row: Row) -> str:
    """What is asked, however it is spaced and capitalised."""
    return " ".join(f"{row.get('instruction', '')} {row.get('input') or ''}".split()).casefold()


def _distinct(rows: Iterable[Row]) -> Iterator[Row]:
    seen: set[str] = set()
    for row in rows:
        if question(row) not in seen:
            seen.add(question(row))
            yield row


def _as_row(item: Mapping[str, str]) -> Row:
    return {"instruction": item["question"], "input": "", "output": item["answer"], "answer": item["answer"]}


def _rows(rows: list[Row], source: str) -> Rows:
    if not rows:
        raise SMTError(f"{source}: the set is empty")
    return Rows(rows, source, range(1, len(rows) + 1), "row")
