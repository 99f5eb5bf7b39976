"""Load data rows from JSON, JSONL or the hub, and check them, with errors that name the row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from smt_dist.errors import SMTError, first_line
from smt_dist.files import refuse_double_keys

RowFormat = Literal["instruction", "messages", "text"]
FORMATS_HELP = "'instruction' and 'output' (and perhaps 'input'), or 'messages', or 'text'"


@dataclass(frozen=True)
class Rows(Sequence):
    """Hold the rows of a data source, each with its number there.

    Attributes:
        rows: one JSON object a row, in the order of the source.
        source: file or hub name, for messages.
        numbers: 1-based row number (JSON, hub) or line number (JSONL) of each row.
        unit: what ``numbers`` counts: "row" or "line".
    """

    rows: list[dict[str, Any]]
    source: str
    numbers: Sequence[int]
    unit: str

    def __getitem__(self, index):
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def error(self, index: int, problem: str) -> SMTError:
        """Return the exception for row ``index`` (0-based), one line that names source and row."""
        return SMTError(f"{self.source}, {self.unit} {self.numbers[index]}: {problem}")

    def require_text(self, index: int, field: str, *, optional: bool = False) -> str:
        """Return the string in ``field`` of row ``index``; "" if it is optional and absent or null.

        Raises:
            SMTError: the field is missing or isn't a string.
        """
        value = self.rows[index].get(field)
        if value is None and optional:
            return ""
        if value is None:
            raise self.error(index, f"field '{field}' is missing")
        if not isinstance(value, str):
            raise self.error(index, f"field '{field}' must be a string, not {type(value).__name__}")
        if not _is_text(value):
            raise self.error(index, f"field '{field}' holds a lone surrogate (half a character)")
        return value


def read_rows(path: str | Path) -> Rows:
    """Load a JSON list of objects, or JSON lines (one object per line; blank lines are skipped).

    The content decides between the two, because many JSONL files are named ``.json``.

    Raises:
        SMTError: the file is missing, empty, not UTF-8, not JSON, or a row isn't an object.
    """
    path = Path(path)
    text = _read_text(path)
    if not text.strip():
        raise SMTError(f"{path}: the file is empty")
    if text.lstrip().startswith("[") and path.suffix != ".jsonl":
        values = _parse(text, str(path))
        rows = Rows(values, str(path), range(1, len(values) + 1), "row")
    else:
        # Not splitlines(): it also splits at U+2028 and others, which JSON allows inside a string.
        lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
        values = [_parse(line, f"{path}, line {number}") for number, line in lines]
        rows = Rows(values, str(path), [number for number, _ in lines], "line")
    if not rows:
        raise SMTError(f"{path}: the list has no rows")
    for index, row in enumerate(values):
        if not isinstance(row, dict):
            raise rows.error(index, f"must be a JSON object, not {type(row).__name__}")
    return rows


def load_hub_rows(name: str, config: str | None = None, split: str = "train") -> Rows:
    """Load a data set of the Hugging Face hub.

    ``name`` can also be a folder that ``datasets.load_dataset`` accepts. The first process fills the hub's cache: call
    this function in :func:`smt_dist.distributed.main_process_first`.

    Raises:
        SMTError: the data set, its config or its split can't be loaded, or has no rows.
    """
    import datasets  # slow to import, and most runs read a file

    source = f"data set '{name}'" + (f" ({config})" if config else "") + f", split '{split}'"
    try:
        dataset = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise SMTError(f"{source}: can't be loaded: {first_line(error)}") from error
    if not isinstance(dataset, datasets.Dataset) or not len(dataset):
        raise SMTError(f"{source}: has no rows")
    fields = [f for f in ("instruction", "input", "output", "messages", "text") if f in dataset.column_names]
    rows = dataset.select_columns(fields).to_list() if fields else [{}] * len(dataset)
    return Rows(rows, source, range(1, len(rows) + 1), "row")


def check_rows(rows: Rows) -> RowFormat:
    """Return the format that all rows share, and check every field that training reads.

    A row with ``instruction`` can have a ``text`` too (Stanford Alpaca's prompt and output in one): it counts as
    ``instruction``.

    Raises:
        SMTError: a row has no format, two formats, another one than the first row, or a missing or mistyped field;
            names the first such row.
    """
    first = _row_format(rows, 0)
    for index in range(len(rows)):
        row_format = _row_format(rows, index)
        if row_format != first:
            raise rows.error(index, f"is a '{row_format}' row, but the rows before it are '{first}' rows")
        if first == "instruction":
            rows.require_text(index, "instruction")
            rows.require_text(index, "input", optional=True)
            rows.require_text(index, "output")
        elif first == "text":
            rows.require_text(index, "text")
        else:
            _check_messages(rows, index)
    return first


def _row_format(rows: Rows, index: int) -> RowFormat:
    # A null counts as absent: merging data sets fills missing columns with nulls.
    found = [name for name in ("instruction", "messages", "text") if rows[index].get(name) is not None]
    if not found:
        raise rows.error(index, f"has no field that says its format: expected {FORMATS_HELP}")
    if "messages" in found and len(found) > 1:
        raise rows.error(index, f"has '{found[0]}' and '{found[1]}': can't tell which one to train on")
    return found[0]


def _check_messages(rows: Rows, index: int) -> None:
    messages = rows[index]["messages"]
    if not isinstance(messages, list) or not messages:
        raise rows.error(index, "field 'messages' must be a list of at least one {role, content} object")
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise rows.error(index, f"message {number} must be an object with 'role' and 'content'")
        for field in ("role", "content"):
            if not isinstance(message.get(field), str):
                raise rows.error(index, f"message {number}: field '{field}' is missing or not a string")
            if not _is_text(message[field]):
                raise rows.error(index, f"message {number}: field '{field}' holds a lone surrogate (half a character)")


def _is_text(value: str) -> bool:
    """Return whether a string has no lone surrogate, which JSON can hold and tokenizers reject."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise SMTError(f"{path}: no such file") from None
    except OSError as error:
        raise SMTError(f"{path}: can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SMTError(f"{path}: isn't UTF-8 text (byte {error.start})") from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=refuse_double_keys)
    except (ValueError, RecursionError) as error:
        raise SMTError(
            f"{where}: not JSON ({first_line(error)}); expected a list of objects, or one object a line"
        ) from error
