"""Define ``BlockScores``, one fp64 table per module, and save and load it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from smt_dist.errors import SMTError
from smt_dist.files import parse_json_object, read_tensors, replace_file
from smt_dist.sparse.blocks import BlockSelection

SCORES_FILE = "smt_scores.safetensors"


def scores_path(selection_file: str | Path) -> Path:
    """Return the path of a selection file's scores, in the same folder."""
    path = Path(selection_file)
    return path.with_name(f"{path.stem}_scores.safetensors")


def save_scores(scores: BlockScores, path: Path) -> None:
    """Write scores to a file, from one rank only. Equal scores give equal files."""
    about = {
        "block_size": scores.block_size,
        "modules": list(scores.tables),  # safetensors keeps no order
        "shapes": scores.shapes,
        "groups": scores.groups,
        "parameters_2d": scores.parameters_2d,
        "score": scores.score,
        "steps": scores.steps,
    }
    tables = {name: table.contiguous() for name, table in scores.tables.items()}
    # One key only: safetensors writes several in random order.
    replace_file(path, lambda beside: save_file(tables, beside, {"scores": json.dumps(about)}))


def load_scores(path: str | Path) -> BlockScores:
    """Load scores from a file.

    Raises:
        SMTError: the file is missing, damaged or not a file of scores; names it.
    """
    tables, metadata = read_tensors(Path(path))
    about = parse_json_object(metadata.get("scores", ""), f"{path}: scores")
    try:
        return BlockScores(
            block_size=tuple(about["block_size"]),
            tables={name: tables[name].to(torch.float64) for name in about["modules"]},
            shapes={name: tuple(shape) for name, shape in about["shapes"].items()},
            groups=about["groups"],
            parameters_2d=about["parameters_2d"],
            score=about["score"],
            steps=about["steps"],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise SMTError(f"{path}: not a file of scores ({error!r})") from None


def belongs_to(scores: BlockScores, selection: BlockSelection) -> bool:
    """Return whether the scores cover the selection's modules, with equal shapes and block size."""
    return scores.block_size == selection.block_size and all(
        module in scores.tables and selection.shapes.get(module, shape) == shape
        for module, shape in ((name, scores.shapes.get(name, (0, 0))) for name in selection.blocks)
    )


@dataclass(frozen=True)
class BlockScores:
    """Hold one score for each block of each target; equal on every rank.

    Attributes:
        block_size: (rows, cols) in elements.
        tables: module name -> fp64 CPU tensor ``[block rows, block columns]``, in the model's order.
        shapes: module name -> weight shape (out, in).
        groups: config group name -> its module names.
        parameters_2d: elements of all 2-D parameters of the model; a group's ``fraction`` is a share of them.
        score: the score's name in the config.
        steps: global steps that were scored.
    """

    block_size: tuple[int, int]
    tables: dict[str, torch.Tensor]
    shapes: dict[str, tuple[int, int]]
    groups: dict[str, list[str]]
    parameters_2d: int
    score: str
    steps: int
