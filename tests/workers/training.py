"""Trains fixed blocks with SMTTrainer, by one engine after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tiny_models import make_rows

from smt_dist.config import SMTConfig
from smt_dist.data.batches import TrainingData, warmup_batches
from smt_dist.distributed import get_world_size
from smt_dist.engines import make_engine
from smt_dist.selection.warmup import collect_scores
from smt_dist.sparse.blocks import BlockSelection
from smt_dist.sparse.surgery import sparse_layers
from smt_dist.training.arguments import SMTTrainingArguments
from smt_dist.training.pipeline import attach_blocks
from smt_dist.training.trainer import SMTTrainer
from workers.runs import elements_held, engine_arguments, load_model, training_data

STEPS = 4
LEARNING_RATE = 1e-2
WEIGHT_DECAY = 0.1
MAX_GRAD_NORM = 0.5
MULTIPLIERS = {"attention": 1.0, "mlp": 3.0}
BLOCK = (16, 8)
# By hand: every kind of weight, several blocks in one row and in one column, modules without any.
BLOCKS = {
    "model.layers.0.self_attn.q_proj": [(0, 0), (0, 3), (2, 3)],
    "model.layers.0.self_attn.v_proj": [(0, 7)],
    "model.layers.0.mlp.down_proj": [(1, 21), (3, 0)],
    "model.layers.1.self_attn.k_proj": [(0, 2)],
    "model.layers.1.self_attn.v_proj": [(0, 0), (0, 1)],
    "model.layers.1.mlp.up_proj": [(0, 0), (4, 4), (10, 7)],
}


def fixed_config(form: str = "auto") -> SMTConfig:
    """Two groups with learning rates of their own."""
    groups = [
        {"name": "attention", "target_modules": "attention", "blocks": 7, "lr_multiplier": MULTIPLIERS["attention"]},
        {"name": "mlp", "target_modules": "mlp", "blocks": 5, "lr_multiplier": MULTIPLIERS["mlp"]},
    ]
    return SMTConfig.model_validate({"block_size": BLOCK, "groups": groups, "form": form})


def fixed_selection() -> BlockSelection:
    """:data:`BLOCKS`, each with its group."""
    return BlockSelection(block_size=BLOCK, blocks=BLOCKS, groups={module: group_of(module) for module in BLOCKS})


def group_of(module: str) -> str:
    """The config group that a module belongs to."""
    return "mlp" if ".mlp." in module else "attention"


def fixed_data() -> TrainingData:
    """Rows enough for the steps; some without labels, so that some ranks' micro-batches have none."""
    return training_data(make_rows(48, seed=5, unlabelled=(0, 1, 4, 5, 6, 7, 17, 21, 22)), make_rows(8, seed=9))


def make_trainer(
    model_folder: str,
    args: SMTTrainingArguments,
    data: TrainingData,
    gradient_checkpointing: bool = False,
    form: str = "auto",
) -> SMTTrainer:
    """As ``launch/train.py`` does it, from the base to the trainer, with the fixed blocks."""
    model = load_model(model_folder, args)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # The warm-up's own engine must leave nothing behind that the training engine stumbles over.
    with make_engine(args.engine_options).scoring(model):
        collect_scores(model, warmup_batches(data, args.batch_order, steps=1), fixed_config())
    attach_blocks(model, fixed_selection(), fixed_config(form), args)
    return SMTTrainer(model, args, train_dataset=data.train, eval_dataset=data.evaluation, data_collator=data.collator)


def engine_type(trainer: SMTTrainer) -> str:
    """What wraps the model and what steps, as class names: DeepSpeed's optimizer lies inside accelerate's."""
    optimizer = trainer.optimizer
    while "accelerate" in type(optimizer).__module__:
        optimizer = optimizer.optimizer
    return f"{type(trainer.model_wrapped).__name__}, {type(optimizer).__name__}"


def logged(trainer: SMTTrainer, key: str = "loss") -> list[float]:
    """What Trainer logged, step by step."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def release(trainer: SMTTrainer) -> None:
    """Take DeepSpeed's hooks and buffers down, so that the next engine of the process starts clean."""
    destroy = getattr(trainer.model_wrapped, "destroy", None)
    if destroy is not None:
        destroy()


def train(folder: Path, model: str, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each run: ``engine``, ``dtype``, ``accumulation``, ``checkpointing`` and the blocks' ``form``."""
    return [_train(folder / f"run{index}", model, **run) for index, run in enumerate(runs)]


def _train(
    folder: Path, model: str, engine: str, dtype: str, accumulation: int, checkpointing: bool, form: str
) -> dict[str, Any]:
    options = {
        "dtype": dtype,
        "max_steps": STEPS,
        "learning_rate": LEARNING_RATE,
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": MAX_GRAD_NORM,
        "train_sampling_strategy": "sequential",
    }
    with engine_arguments(engine, folder, accumulation, **options) as args:
        trainer = make_trainer(model, args, fixed_data(), checkpointing, form)
        recomputes = sum(getattr(module, "gradient_checkpointing", False) for module in trainer.model.modules())
        trainer.train()
        result = {
            "world_size": get_world_size(),
            "engine": engine_type(trainer),
            "losses": logged(trainer),
            "gradient_norms": [float(norm) for norm in logged(trainer, "grad_norm")],
            "learning_rates": logged(trainer, "learning_rate"),
            "blocks": dict(trainer.engine.read_blocks(trainer.model, trainer.optimizer)),
            "base_dtypes": sorted({str(p.dtype) for n, p in trainer.model.named_parameters() if "delta" not in n}),
            "base_elements_held": elements_held(trainer.model),
            "layers_recomputed": recomputes,
            "in_place": all(layer.is_in_place for layer in sparse_layers(trainer.model).values()),
            "trainable": sorted(n for n, p in trainer.model.named_parameters() if p.requires_grad),
        }
        assert set(result["blocks"]) == set(sparse_layers(trainer.model))
        assert all(torch.isfinite(block).all() for block in result["blocks"].values())
        release(trainer)
        return result
