"""Selections of every score, strategy and number of passes, by one engine after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from smt_dist.config import SMTConfig
from smt_dist.data.batches import warmup_batches
from smt_dist.data.dataset import trained_tokens
from smt_dist.distributed import get_world_size
from smt_dist.engines import make_engine
from smt_dist.selection.select import select_blocks
from smt_dist.selection.warmup import collect_scores
from smt_dist.sparse.blocks import BlockGrid
from workers.runs import elements_held, engine_arguments, load_model, standard_data

CUSTOM = "workers.selection.spread_of_saliency"
SCORES = [f"{score}{suffix}" for suffix in ("", "_per_step") for score in ("mean_abs", "abs_mean", "l1", "l2")]
SCORES += ["grad_x_weight", "activation", "magnitude", "random", "diagonal", CUSTOM]
STRATEGIES = ["even", "no_restriction", "norm_dist"]
STEPS = 3
TWICE = ("mean_abs", "abs_mean", "l2_per_step", "grad_x_weight", CUSTOM)
PASSES = {score: (1, 2) if score in TWICE else (1,) for score in SCORES}


def spread_of_saliency(gradient: torch.Tensor, weight: torch.Tensor, input_rms: torch.Tensor, grid: BlockGrid) -> Any:
    """A score that takes all there is: the variance of G * weight * input over a block."""
    values = gradient.double() * weight.double() * input_rms
    blocks = values.unflatten(0, (-1, grid.block_rows)).unflatten(2, (-1, grid.block_cols))
    return blocks.var(dim=(1, 3))


def make_config(score: str, strategy: str = "no_restriction", passes: int = 1) -> SMTConfig:
    """Groups of different budgets; rectangular blocks that neither 2 nor 4 ranks' rows end on.

    Embedding and head are a group of their own, except where inputs are scored: ids have no columns.
    """
    groups: list[dict[str, Any]] = [
        {"name": "attention", "target_modules": "attention", "blocks": 13},
        {"name": "mlp", "target_modules": ["up_proj", "down_proj"], "fraction": 0.05},
    ]
    if score not in ("activation", CUSTOM):
        groups.append({"name": "ends", "target_modules": ["embed_tokens", "lm_head"], "blocks": 9})
    return SMTConfig.model_validate(
        {
            "block_size": [16, 8],
            "groups": groups,
            "selection": {"score": score, "strategy": strategy},
            "warmup": {"steps": STEPS, "passes": passes},
        }
    )


def select_with(folder: Path, engines: list[str], model: str) -> dict[str, Any]:
    """What each engine chose, its scores, and how the base was held."""
    return {engine: _select(folder, engine, model) for engine in engines}


def _select(folder: Path, engine: str, model_folder: str) -> dict[str, Any]:
    data = standard_data()
    found: dict[str, Any] = {"world_size": get_world_size(), "selections": {}, "tables": {}}
    with engine_arguments(engine, folder / "out", accumulation=2) as args:
        model = load_model(model_folder, args)
        found["base_elements_held"] = elements_held(model)
        found["micro_batches_without_labels"] = sum(
            trained_tokens(batch) == 0 for step in warmup_batches(data, args.batch_order, STEPS) for batch in step
        )
        with make_engine(args.engine_options).scoring(model):
            for score in SCORES:
                for passes in PASSES[score]:
                    config = make_config(score, passes=passes)
                    scores = collect_scores(model, warmup_batches(data, args.batch_order, STEPS), config)
                    found["tables"][f"{score}, {passes}"] = scores.tables
                    for strategy in STRATEGIES:
                        selection = select_blocks(scores, make_config(score, strategy, passes))
                        found["selections"][f"{score}, {strategy}, {passes}"] = selection.to_json()
        found["base_elements_after"] = elements_held(model)
        found["gradients"] = sum(parameter.grad is not None for parameter in model.parameters())
        assert not any(torch.isnan(table).any() for table in scores.tables.values())
    return found
