"""Select under settings that should not matter much, and compare the selections.

Each setting is one run, kept on disk; runs are compared in pairs.

An axis varies one thing and keeps the rest: ``seeds`` (order of the data, dropout, random scores), ``steps`` (of the
warm-up), ``halves`` (of the rows), ``files`` (tasks) and ``block_sizes`` (at an equal number of trained parameters).
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smt_dist.cli.selection_report import keep_scores
from smt_dist.config import SMTConfig, parse_model
from smt_dist.data.batches import TrainingData
from smt_dist.distributed import broadcast_first, get_rank
from smt_dist.engines.base import Engine
from smt_dist.errors import SMTError
from smt_dist.fault_tolerance.activity import begin_activity
from smt_dist.selection.block_scores import load_scores
from smt_dist.selection.custom_scores import load_score_function
from smt_dist.selection.select import choose_blocks
from smt_dist.selection.stability import chance_jaccard, chosen_share, jaccard, rank_correlation
from smt_dist.training.arguments import SMTTrainingArguments
from smt_dist.training.pipeline import collect, load_data
from smt_dist.training.run_arguments import RunArguments

AXES = ("seeds", "steps", "halves", "files", "block_sizes")
HALVES = ("first", "second")
SPLIT_SEED = 0  # of the halves


@dataclass(frozen=True)
class Cell:
    """Describe one selection to make.

    Attributes:
        axis: what is varied.
        label: its value.
        config: of the selection.
        seed: of the data's order.
        train_file: its rows; None for ``--dataset_name``'s.
        half: of the rows; None for all.
    """

    axis: str
    label: str
    config: SMTConfig
    seed: int
    train_file: str | None
    half: str | None = None


def parse_axes(texts: list[str]) -> dict[str, list[str]]:
    """Parse ``["seeds=0,1", "halves"]`` as axis -> values.

    An axis without values has an empty list.

    Raises:
        SMTError: an unknown axis, one given twice, or fewer than two values; names it.
    """
    axes: dict[str, list[str]] = {}
    for text in texts:
        axis, equals, values = text.partition("=")
        if axis not in AXES:
            raise SMTError(f"--stability: {axis!r} is not one of {', '.join(AXES)}")
        if axis in axes:
            raise SMTError(f"--stability: {axis} is given twice")
        found = list(dict.fromkeys(value for value in values.split(",") if value))
        if axis == "halves" and equals:
            raise SMTError("--stability: halves takes no values")
        if equals and len(found) < 2:
            raise SMTError(f"--stability: {text!r}: give two different values or more, to compare")
        if not equals and axis in ("files", "block_sizes"):
            raise SMTError(f"--stability: {axis} needs values, such as {axis}=a,b")
        axes[axis] = found
    return axes


def plan_cells(axes: Mapping[str, list[str]], config: SMTConfig, seed: int, train_file: str | None) -> list[Cell]:
    """List the selections to make.

    Args:
        axes: of :func:`parse_axes`. Without values, ``seeds`` takes three and ``steps`` a quarter, half and all.
        config: what isn't varied.
        seed: of the data's order.
        train_file: the rows.

    Raises:
        SMTError: a value is no whole number, or no valid one; names the axis.
    """
    cells = []
    steps = config.warmup.steps
    defaults = {
        "seeds": [str(seed + index) for index in range(3)],
        "steps": [str(count) for count in sorted({max(1, steps // 4), max(1, steps // 2), steps})],
        "halves": list(HALVES),
    }
    for axis, given in axes.items():
        values = given or defaults[axis]
        if len(values) < 2:
            raise SMTError(f"--stability: {axis}: warmup.steps {steps} leaves nothing to compare; give values")
        for value in values:
            cell = Cell(axis, value, config, seed, train_file)
            if axis == "seeds":
                number = _whole(axis, value, least=0)
                cell = replace(cell, config=_changed(config, axis, selection={"seed": number}), seed=number)
            elif axis == "steps":
                cell = replace(cell, config=_changed(config, axis, warmup={"steps": _whole(axis, value)}))
            elif axis == "halves":
                cell = replace(cell, half=value)
            elif axis == "files":
                cell = replace(cell, train_file=value)
            else:
                cell = replace(cell, config=_with_block_size(config, _whole(axis, value)))
            cells.append(cell)
    return cells


def run_cells(
    cells: list[Cell],
    folder: Path,
    run: RunArguments,
    args: SMTTrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    engine: Engine,
) -> list[Path]:
    """Score each cell that ``folder`` doesn't have yet; collective.

    Returns the cells' files, which rank 0 has written.
    """
    paths = [folder / f"{_key(cell, run, args)}.safetensors" for cell in cells]
    loaded: tuple[str | None, TrainingData] | None = None
    for cell, path in tqdm(
        list(zip(cells, paths, strict=True)), desc="selections", disable=args.disable_tqdm or get_rank() != 0
    ):
        if broadcast_first(torch.tensor([int(path.exists())])).item():
            continue
        data = None
        if cell.config.selection.needs_batches:
            if loaded is None or loaded[0] != cell.train_file:
                loaded = cell.train_file, load_data(_with_file(run, cell.train_file), tokenizer)
            data = _half(loaded[1], cell.half)
        begin_activity(f"warm-up, {cell.axis} {cell.label}")
        with _data_seed(args, cell.seed):
            scores = collect(model, data, cell.config, args, engine)
        keep_scores(scores, path)
    return paths


def compare(cells: list[Cell], paths: list[Path]) -> dict[str, Any]:
    """Compare every pair of an axis and return all figures and their means.

    Runs on one rank, from the files.

    Returns:
        axis -> ``pairs``: values, Jaccard, what chance would give, rank correlation; and ``mean`` and ``least``.
    """
    scores = [load_scores(path) for path in paths]
    selections = [choose_blocks(found, cell.config) for cell, found in zip(cells, scores, strict=True)]
    result: dict[str, Any] = {}
    for axis in dict.fromkeys(cell.axis for cell in cells):
        own = [index for index, cell in enumerate(cells) if cell.axis == axis]
        pairs = [
            {
                "first": cells[a].label,
                "second": cells[b].label,
                "jaccard": jaccard(selections[a], selections[b]),
                "jaccard_by_chance": chance_jaccard(*(chosen_share(selections[i], scores[i]) for i in (a, b))),
                "rank_correlation": rank_correlation(scores[a], scores[b]),
            }
            for a, b in combinations(own, 2)
        ]
        result[axis] = {"pairs": pairs, "mean": _over(pairs, _mean), "least": _over(pairs, min)}
    return result


def table(result: Mapping[str, Any]) -> str:
    """Format the means as text for a terminal, or as Markdown."""
    lines = [
        "| | pairs | Jaccard, mean (least) | by chance | rank correlation, mean (least) |",
        "|---|---|---|---|---|",
    ]
    for axis, found in result.items():
        mean, least = found["mean"], found["least"]
        columns = [f"{_shown(mean[key])} ({_shown(least[key])})" for key in ("jaccard", "rank_correlation")]
        chance = _shown(mean["jaccard_by_chance"])
        lines.append(f"| {axis} | {len(found['pairs'])} | {columns[0]} | {chance} | {columns[1]} |")
    return "\n".join(lines)


def _over(pairs: list[dict[str, Any]], combine: Any) -> dict[str, float | None]:
    keys = ("jaccard", "jaccard_by_chance", "rank_correlation")
    values = {key: [pair[key] for pair in pairs if pair[key] is not None] for key in keys}
    return {key: combine(found) if found else None for key, found in values.items()}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _whole(axis: str, text: str, least: int = 1) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) < least:
        raise SMTError(f"--stability: {axis}: {text!r} is not a whole number of at least {least}")
    return int(text)


def _changed(config: SMTConfig, axis: str, **sections: dict[str, Any]) -> SMTConfig:
    content = json.loads(config.to_json())
    for name, changes in sections.items():
        content[name] = {**content[name], **changes}
    return parse_model(SMTConfig, json.dumps(content), f"--stability: {axis}")


def _with_block_size(config: SMTConfig, side: int) -> SMTConfig:
    """Return the config for another block size with as many parameters per budget.

    As near as whole blocks allow.
    """
    content = {**json.loads(config.to_json()), "block_size": side}
    size = config.block_size
    for group in content["groups"]:
        if "blocks" in group:
            if size == "auto":
                raise SMTError('--stability: block_sizes: a budget in blocks needs a block_size other than "auto"')
            rows, cols = (size, size) if isinstance(size, int) else size
            group["blocks"] = max(1, group["blocks"] * rows * cols // side**2)
    return parse_model(SMTConfig, json.dumps(content), "--stability: block_sizes")


def _with_file(run: RunArguments, train_file: str | None) -> RunArguments:
    return replace(run, train_file=train_file, dataset_name=None if train_file is not None else run.dataset_name)


def _half(data: TrainingData, half: str | None) -> TrainingData:
    """Draw half of the rows, the same ones on every rank.

    Every row is in one of the two halves.
    """
    if half is None:
        return data
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(SPLIT_SEED)).tolist()
    middle = len(order) // 2
    chosen = order[:middle] if half == HALVES[0] else order[middle:]
    return replace(data, train=data.train.select(sorted(chosen)))


@contextmanager
def _data_seed(args: SMTTrainingArguments, seed: int) -> Iterator[None]:
    before, args.data_seed = args.data_seed, seed
    try:
        yield
    finally:
        args.data_seed = before


def _key(cell: Cell, run: RunArguments, args: SMTTrainingArguments) -> str:
    """Hash everything that the scores depend on.

    Engine and world size aren't in it, since scores don't depend on them.
    """
    content = {
        "seed": cell.seed,
        "half": cell.half,
        "config": json.loads(cell.config.to_json()),
        "function": _source_mark(cell.config),
        "rows": _file_mark(cell.train_file) if cell.config.selection.needs_batches else None,
        "dataset": [run.dataset_name, run.dataset_config],
        "model": [run.model_name_or_path, run.gguf_file, _folder_mark(run.model_name_or_path), args.dtype],
        "data": [run.max_seq_length, run.packing, run.prompt_style],
        "micro_batch": args.per_device_train_batch_size,
        "global_batch": args.train_batch_size * args.world_size * args.gradient_accumulation_steps,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


def _file_mark(path: str | None) -> str | None:
    if path is None:
        return None
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise SMTError(f"{path}: {error.strerror}") from None


def _source_mark(config: SMTConfig) -> str | None:
    """Hash a score function's source, so that an edited one counts as another."""
    if not config.selection.is_custom:
        return None
    source = inspect.getsourcefile(inspect.unwrap(load_score_function(config.selection.score).function))
    return _file_mark(source)


def _folder_mark(name: str | None) -> list[tuple[str, int, int]]:
    """Return size and time of a model folder's files.

    Another model of the same name then counts as another one.
    """
    folder = Path(name or "")
    if name is None or not folder.is_dir():
        return []
    stats = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    return [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats]
