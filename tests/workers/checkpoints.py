"""Trains, saves in the middle, goes on from there in a new model and trainer, and compares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from smt_dist.checkpoint.rotation import last_checkpoint
from smt_dist.distributed import barrier, get_rank, get_world_size
from smt_dist.training.trainer import SMTTrainer
from workers.runs import engine_arguments
from workers.training import engine_type, fixed_data, logged, make_trainer, release

# 48 rows and 8 a step: the checkpoint lies in the middle of the first epoch, the end in the second.
SAVED_AT, STEPS = 3, 8
BEST_AT = 2


class _PeakMetric(TrainerCallback):
    """A metric that doesn't depend on luck."""

    def on_evaluate(self, _args: Any, state: Any, _control: Any, metrics: dict[str, float], **_: Any) -> None:
        metrics["eval_peak"] = -abs(state.global_step - BEST_AT)


def resume(folder: Path, model: str, runs: list[list[str]]) -> list[dict[str, Any]]:
    """Each run: engine and dtype."""
    return [_resume(folder / f"{engine}-{dtype}", model, engine, dtype) for engine, dtype in runs]


def _resume(folder: Path, model: str, engine: str, dtype: str) -> dict[str, Any]:
    def options(kind: str) -> dict[str, Any]:
        return {
            "engine": engine,
            "output": folder / kind,
            "accumulation": 2,
            "dtype": dtype,
            "max_steps": STEPS,
            "save_strategy": "steps",
            "save_steps": SAVED_AT,
            "save_total_limit": 1 if kind == "again" else None,
        }

    with engine_arguments(**options("straight")) as args:
        trainer = make_trainer(model, args, fixed_data())
        trainer.train()
        trainer.save_model()
        straight = _state(trainer)
        kind = engine_type(trainer)
        release(trainer)
        del trainer
    checkpoint = folder / "straight" / f"checkpoint-{SAVED_AT}"
    # Anything that isn't in the checkpoint comes out differently from here on.
    with engine_arguments(**options("again"), seed=0) as args:
        torch.manual_seed(1234 + get_rank())
        trainer = make_trainer(model, args, fixed_data())
        trainer.train(resume_from_checkpoint=str(checkpoint))
        trainer.save_model()
        resumed = _state(trainer)
        release(trainer)
    barrier()
    return {
        "world_size": get_world_size(),
        "engine": kind,
        "folder": str(folder),
        "checkpoint": str(checkpoint),
        "newest": str(last_checkpoint(str(folder / "straight"))),
        "straight": straight,
        "resumed": resumed,
    }


def _state(trainer: SMTTrainer) -> dict[str, Any]:
    blocks = dict(trainer.engine.read_blocks(trainer.model, trainer.optimizer))
    moments = trainer.engine.read_moments(trainer.model, trainer.optimizer)
    return {
        "losses": logged(trainer),
        "gradient_norms": [float(norm) for norm in logged(trainer, "grad_norm")],
        "learning_rates": logged(trainer, "learning_rate"),
        "step": moments.counters["step"],
        "state": {module: {"delta": blocks[module], **found} for module, found in moments.tensors},
        "random": torch.get_rng_state(),
    }


def best(folder: Path, model: str, engines: list[str]) -> dict[str, dict[str, Any]]:
    """The metric peaks at step :data:`BEST_AT`, so the best blocks aren't the last."""
    return {engine: _best(folder / f"best-{engine}", model, engine) for engine in engines}


def _best(folder: Path, model: str, engine: str) -> dict[str, Any]:
    options = {
        "dtype": "bfloat16",
        "max_steps": 4,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_peak",
        "greater_is_better": True,
    }
    with engine_arguments(engine, folder, **options) as args:
        trainer = make_trainer(model, args, fixed_data())
        trainer.add_callback(_PeakMetric())
        trainer.train()
        result = {
            "engine": engine_type(trainer),
            "evaluation_losses": logged(trainer, "eval_loss"),
            "best": trainer.state.best_model_checkpoint,
            "last": str(last_checkpoint(str(folder))),
            "blocks": dict(trainer.engine.read_blocks(trainer.model, trainer.optimizer)),
            "loss_with_them": trainer.evaluate()["eval_loss"],
        }
        trainer.save_model()
        release(trainer)
        return result


def everything(folder: Path, model: str, runs: list[list[str]], best_of: list[str]) -> dict[str, Any]:
    """Both, in one start of the processes."""
    return {"resumed": resume(folder, model, runs), "best": best(folder, model, best_of)}
