"""Trains with re-selection, looks at the state around each re-selection, and resumes inside a round and before one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import TrainerCallback

from smt_dist.checkpoint.atomic import VerifiedFolder
from smt_dist.config import ReselectConfig, SMTConfig
from smt_dist.distributed import barrier, get_rank, get_world_size
from smt_dist.sparse.surgery import ever_trained_selection, frozen_layers, sparse_layers
from smt_dist.training import rounds
from smt_dist.training.arguments import SMTTrainingArguments
from smt_dist.training.pipeline import attach_blocks
from smt_dist.training.rounds import trainer_class
from smt_dist.training.run_arguments import RunArguments
from smt_dist.training.run_plan import RunPlan
from smt_dist.training.trainer import SMTTrainer
from workers.runs import engine_arguments, load_model
from workers.training import engine_type, fixed_config, fixed_data, fixed_selection, logged, release

EVERY, FRACTION, STEPS = 2, 0.5, 6
MIDDLE = 3  # a checkpoint inside the second round


def config() -> SMTConfig:
    """7 and 5 blocks, of which 3 and 2 drop at a time."""
    settings = {"every": EVERY, "fraction": FRACTION, "steps": 2}
    return fixed_config().model_copy(update={"reselect": ReselectConfig.model_validate(settings)})


class _AtStart(TrainerCallback):
    """Reads the state that the engine has when a round begins, and how the model is made up then."""

    def __init__(self) -> None:
        self.trainer: SMTTrainer | None = None
        self.found: list[dict[str, Any]] = []

    def on_train_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if state.global_step:
            self.found.append({"step": state.global_step, **read_state(self.trainer)})


def read_state(trainer: SMTTrainer) -> dict[str, Any]:
    """Masters and moments of trained blocks, frozen masters, and which blocks these are."""
    model = trainer.model
    moments = trainer.engine.read_moments(model, trainer.optimizer)
    return {
        "active": model.smt.selection.to_json(),
        "ever_trained": ever_trained_selection(model).to_json(),
        "masters": dict(trainer.engine.read_blocks(model, trainer.optimizer)),
        "moments": {f"{module}:{key}": value for module, found in moments.tensors for key, value in found.items()},
        "counters": moments.counters,
        "frozen": {name: layer.master for name, layer in frozen_layers(model).items()},
        "frozen_blocks": {n: [list(block) for block in layer.blocks] for n, layer in frozen_layers(model).items()},
    }


def train(folder: Path, model: str, engines: list[str], killed: list[str]) -> dict[str, Any]:
    """Each engine: a straight run and one that resumes it; for ``killed`` ones also one from before a re-selection."""
    return {engine: _train(folder / engine, model, engine, engine in killed) for engine in engines}


def _train(folder: Path, model: str, engine: str, is_killed: bool) -> dict[str, Any]:
    kept = folder / "before"

    def keeping(trainer: SMTTrainer, settings: Any, checkpoint: VerifiedFolder) -> VerifiedFolder:
        if get_rank() == 0:
            shutil.copytree(checkpoint, kept / checkpoint.folder.name)
        barrier()
        return reselect(trainer, settings, checkpoint)

    reselect = rounds.reselect
    with mock.patch.object(rounds, "reselect", keeping):
        straight = _run(folder / "straight", model, engine, None)
    middle = _run(folder / "middle", model, engine, folder / "straight" / f"checkpoint-{MIDDLE}")
    found = {"straight": straight, "middle": middle, "kept": str(kept)}
    if not is_killed:
        return found
    # As if killed after the checkpoint at the end of the first round, and before its re-selection.
    killed = folder / "killed" / f"checkpoint-{EVERY}"
    if get_rank() == 0:
        shutil.copytree(kept / killed.name, killed)
    barrier()
    return found | {"before": _run(folder / "killed", model, engine, killed)}


def _run(output: Path, model: str, engine: str, resume: Path | None) -> dict[str, Any]:
    options = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": MIDDLE, "adam_beta2": 0.95}
    with engine_arguments(engine, output, 8 // get_world_size() // 2, **options) as args:
        trainer, watch = _make_trainer(model, args, resume)
        result = trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        trainer.save_model()
        found = {
            "world_size": get_world_size(),
            "engine": engine_type(trainer),
            "losses": logged(trainer),
            "loss": result.training_loss,
            "rounds": watch.found,
            "end": read_state(trainer),
            "trainable": sum(p.requires_grad for p in trainer.model.parameters()) - len(sparse_layers(trainer.model)),
            "output": str(output),
        }
        release(trainer)
    barrier()
    return found


def _make_trainer(model: str, args: SMTTrainingArguments, resume: Path | None) -> tuple[SMTTrainer, _AtStart]:
    """As ``launch/train.py`` does it."""
    base, data, watch = load_model(model, args), fixed_data(), _AtStart()
    selection, adapter = fixed_selection(), None
    if resume is not None:
        plan = RunPlan.resolve(RunArguments(), resume=str(resume))
        selection, adapter = plan.selection, plan.adapter
    attach_blocks(base, selection, config(), args, adapter, str(resume))
    watch.trainer = trainer_class(base)(
        base,
        args,
        train_dataset=data.train,
        eval_dataset=data.evaluation,
        data_collator=data.collator,
        callbacks=[watch],
    )
    assert all(torch.is_floating_point(p) for p in base.parameters())
    return watch.trainer, watch
