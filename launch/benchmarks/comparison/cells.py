"""A cell: one subprocess's work, named by the hash of all that its figures depend on; and the files that are kept."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from smt_dist.errors import SMTError
from smt_dist.files import parse_json_object, read_text, replace_file

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

FORMAT = 1  # of the cells' files; another one is another cell
FIGURES = {
    "train": {"trainable", "validation_loss", "step_seconds", "peak_bytes", "artefact_bytes", "batches", "seconds"},
    "test": {"test_loss", "accuracy", "items", "seconds"},
}


@dataclass(frozen=True)
class Cell:
    """One subprocess.

    Attributes:
        kind: ``train``: train and find the validation loss, without knowing of a test set. ``test``: load what was
            saved, find the test loss and answer the questions.
        label: for people.
        method: name of the method.
        request: what the figures depend on; its hash is the cell's name.
        paths: where the files are, which figures don't depend on.
    """

    kind: Literal["train", "test"]
    label: str
    method: str
    request: dict[str, Any]
    paths: dict[str, str]

    @property
    def key(self) -> str:
        """The name of the cell's files."""
        content = {"format": FORMAT, "kind": self.kind, **self.request}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


class CellStore:
    """The files of a comparison's cells: results, logs of failures, and what was trained.

    Args:
        folder: the comparison's ``--output``.
    """

    def __init__(self, folder: Path) -> None:
        self.cells = folder / "cells"
        self.artefacts = folder / "artefacts"
        self._known: dict[str, dict[str, Any] | None] = {}

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """A finished cell's figures; None where there are none, or none that can be read, which a warning says."""
        if self._known.get(cell.key) is None:
            self._known[cell.key] = self._read(cell)
        return self._known[cell.key]

    def _read(self, cell: Cell) -> dict[str, Any] | None:
        path = self.path(cell)
        if not path.exists():
            return None
        try:
            content = parse_json_object(read_text(path), str(path))
            figures = content.get("figures")
            if content.get("request") != cell.request or not isinstance(figures, dict):
                raise SMTError(f"{path}: isn't of this cell")
            if missing := FIGURES[cell.kind] - figures.keys():
                raise SMTError(f"{path}: {min(missing)} is missing")
        except SMTError as error:
            logger.warning("%s; the cell is run again", error)
            path.rename(path.with_suffix(".damaged"))
            return None
        return figures

    def write(self, cell: Cell, figures: dict[str, Any]) -> None:
        """Keep a cell's figures."""
        content = {"label": cell.label, "request": cell.request, "figures": figures}
        text = json.dumps(content, indent=1) + "\n"
        replace_file(self.path(cell), lambda beside: beside.write_text(text))

    def path(self, cell: Cell) -> Path:
        """Of the figures."""
        return self.cells / f"{cell.key}.json"

    def log(self, cell: Cell) -> Path:
        """Of what the subprocess says; it stays where the cell failed."""
        return self.cells / f"{cell.key}.log"

    def failure(self, cell: Cell) -> str | None:
        """The last line of a failed cell's log; None where it hasn't failed."""
        try:
            lines = self.failed_mark(cell).read_text(errors="replace").split("\n")
        except FileNotFoundError:
            return None
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")

    def failed_mark(self, cell: Cell) -> Path:
        """The log of a cell that failed."""
        return self.cells / f"{cell.key}.failed.log"

    def artefact(self, cell: Cell) -> Path:
        """The folder of what a ``train`` cell saves."""
        return self.artefacts / cell.key

    def prune(self, needed: set[str]) -> None:
        """Delete what was trained and is needed no more; ``needed`` are keys of cells."""
        for folder in self.artefacts.iterdir() if self.artefacts.is_dir() else ():
            if folder.name not in needed:
                shutil.rmtree(folder)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else may run cells here. Raises SMTError where somebody does."""
        self.cells.mkdir(parents=True, exist_ok=True)
        with open(self.cells / ".lock", "w") as file:
            if fcntl is not None:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    raise SMTError(f"--output {self.cells.parent}: another comparison runs here") from None
            yield

    def forget_failures(self) -> None:
        """A new launch tries failed cells again."""
        for path in self.cells.glob("*.failed.log"):
            with suppress(FileNotFoundError):
                path.unlink()


def folder_mark(source: str) -> list[Any]:
    """What tells one model from another of the same name: its files' names, sizes and times. A hub name: itself."""
    folder = Path(source)
    if not folder.is_dir():
        return [source]
    stats = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
