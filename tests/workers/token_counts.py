"""Evaluates and trains on rows that ranks and batches don't divide, with the mends and without them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import numpy as np
import torch
from tiny_models import IGNORED, make_rows, sum_of_token_losses
from transformers import EvalPrediction, Trainer

import smt_dist
from smt_dist.data.dataset import CausalLMCollator, pack, pack_lengths
from smt_dist.distributed import get_world_size
from smt_dist.errors import SMTError
from smt_dist.models.chunked_loss import chunk_loss
from smt_dist.models.packing import prepare_model_for_packing
from smt_dist.training.arguments import SMTTrainingArguments
from smt_dist.training.trainer import SMTTrainer
from workers.runs import engine_arguments, load_model
from workers.training import engine_type, fixed_selection, logged, release

GLOBAL_BATCH, EPOCHS, CAPACITY = 4, 2, 32
MENDS = ("get_batch_samples", "prediction_step", "evaluation_loop", "compute_loss")


def evaluation_rows(count: int) -> datasets.Dataset:
    """Rows of very different length, one of them with a single trained token."""
    rows = [make_rows(count, seed=count)[index] for index in range(count)]
    rows[-1]["labels"] = [IGNORED] * (len(rows[-1]["labels"]) - 1) + rows[-1]["labels"][-1:]
    return datasets.Dataset.from_list(rows)


def packed(rows: datasets.Dataset) -> datasets.Dataset:
    """The same rows, several in a sequence."""
    return pack(rows, pack_lengths([len(row["input_ids"]) for row in rows], CAPACITY))


def evaluate(
    folder: Path, model: str, engines: list[str], counts: list[int], batch_sizes: list[int], mended: bool = True
) -> dict[str, Any]:
    """Return by engine: its type, losses by "rows/batch size/kind", what predict has seen."""
    found = {}
    for engine in engines:
        # A step at rate 0 first: transformers makes a ZeRO-1 or 2 engine in training only.
        with engine_arguments(engine, folder / engine, max_steps=1, learning_rate=0.0) as args, _without_mends(mended):
            trainer, losses = _trainer(model, args, make_rows(8), compute_metrics=_count_rows), {}
            trainer.train()
            for count in counts:
                rows = evaluation_rows(count)
                for size in batch_sizes:
                    args.per_device_eval_batch_size = size
                    losses[f"{count}/{size}/plain"] = trainer.evaluate(rows)
                    losses[f"{count}/{size}/packed"] = trainer.evaluate(packed(rows))
            seen = trainer.predict(evaluation_rows(counts[0]))
            found[engine] = {
                "engine": engine_type(trainer),
                "world_size": get_world_size(),
                "losses": {key: metrics["eval_loss"] for key, metrics in losses.items()},
                "rows": {key: metrics["eval_rows"] for key, metrics in losses.items()},
                "labels": torch.tensor(np.asarray(seen.label_ids)),
                "logits": torch.tensor(np.asarray(seen.predictions)),
                "test_loss": seen.metrics["test_loss"],
            }
            release(trainer)
    return found


def train(
    folder: Path, model: str, engines: list[str], plans: list[list[Any]], mended: bool = True
) -> dict[str, list[dict[str, Any]]]:
    """Engine -> what each plan's training logs; a plan: rows, micro-batches of a step, kind.

    Kinds: "plain", "no token count" (a model whose forward takes no ``num_items_in_batch``), "resumed" (the last step
    of the first epoch is done after a resume), "best" (evaluates after each step and keeps the best).
    """
    return {
        engine: [
            _train(folder / f"{engine}-{index}", model, engine, *plan, mended=mended)
            for index, plan in enumerate(plans)
        ]
        for engine in engines
    }


def _train(
    folder: Path, model: str, engine: str, count: int, accumulation: int, kind: str, mended: bool
) -> dict[str, Any]:
    options = {
        "per_device_train_batch_size": GLOBAL_BATCH // get_world_size() // accumulation,
        "num_train_epochs": EPOCHS,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
    }
    if kind == "resumed":
        options |= {"save_strategy": "steps", "save_steps": 1}
    if kind == "best":
        steps = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
        options |= {**steps, "load_best_model_at_end": True, "learning_rate": 0.05}
    checkpoint = None
    if kind == "resumed":
        with engine_arguments(engine, folder, accumulation, **options) as args:
            trainer = _trainer(model, args, make_rows(count, seed=count))
            trainer.train()
            checkpoint = folder / f"checkpoint-{trainer.state.max_steps // EPOCHS - 1}"
            release(trainer)
    with engine_arguments(engine, folder, accumulation, **options) as args, _without_mends(mended):
        trainer = _trainer(model, args, make_rows(count, seed=count), evaluation_rows(5), kind != "no token count")
        trainer.train(checkpoint and str(checkpoint))
        result = {
            "engine": engine_type(trainer),
            "world_size": get_world_size(),
            "gradient_norms": [float(norm) for norm in logged(trainer, "grad_norm")],
            "losses": logged(trainer),
            "eval_losses": logged(trainer, "eval_loss"),
            "best": trainer.state.best_metric,
            "blocks": dict(trainer.engine.read_blocks(trainer.model, trainer.optimizer)),
        }
        release(trainer)
        return result


def edges(folder: Path, model: str, count: int) -> dict[str, Any]:
    """Return what comes of a loss function of one's own, a chunked loss, iterable data, and a dispatched loader."""
    found: dict[str, Any] = {}
    rows = evaluation_rows(count)
    options = {"max_steps": 2, "learning_rate": 0.0, "per_device_eval_batch_size": 2, "per_device_train_batch_size": 1}
    with engine_arguments("ddp", folder / "own", **options) as args:
        trainer = _trainer(model, args, make_rows(8), compute_loss_func=_loss_per_token)
        trainer.train()
        found["own loss"] = trainer.evaluate(rows)["eval_loss"]
    with engine_arguments("ddp", folder / "chunked", **options) as args:
        trainer = _trainer(model, args, make_rows(8), compute_metrics=_count_rows)
        assert chunk_loss(trainer.model, entries=16)
        trainer.train()
        found["chunked"] = trainer.evaluate(rows)
        found["chunked logits"] = tuple(trainer.predict(rows).predictions.shape)
        trainer.compute_metrics = None
        found["chunked, loss alone"] = trainer.evaluate(rows)["eval_loss"]
    equal = datasets.Dataset.from_list(8 * [make_rows(1)[0]])  # accelerate cuts one batch into the ranks'
    for name, data, config in (("iterable", _Rows(equal), {}), ("dispatched", equal, {"dispatch_batches": True})):
        with engine_arguments("ddp", folder / name, **options, accelerator_config=config) as args:
            trainer = _trainer(model, args, data)
            trainer.train()
            found[name] = len(logged(trainer))
    with engine_arguments("ddp", folder / "refused", **options, accelerator_config={"dispatch_batches": False}) as args:
        trainer = _trainer(model, args, make_rows(8))
        try:
            trainer.evaluate(_Rows(rows))
        except SMTError as error:
            found["refused"] = str(error)
    return found


class _Rows(torch.utils.data.IterableDataset):
    """Rows that are read in order, as from a stream."""

    def __init__(self, rows: datasets.Dataset) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


def _loss_per_token(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    return sum_of_token_losses(outputs["logits"], labels) / num_items_in_batch


def _trainer(
    folder: str,
    args: SMTTrainingArguments,
    rows: datasets.Dataset | None = None,
    evaluation: datasets.Dataset | None = None,
    takes_token_count: bool = True,
    **options: Any,
) -> SMTTrainer:
    model = load_model(folder, args)
    prepare_model_for_packing(model, args.per_device_eval_batch_size)
    if not takes_token_count:
        model.accepts_loss_kwargs = False
    smt_dist.apply_selection(model, fixed_selection())
    collator = CausalLMCollator(pad_token_id=0)
    return SMTTrainer(model, args, train_dataset=rows, eval_dataset=evaluation, data_collator=collator, **options)


def _count_rows(prediction: EvalPrediction) -> dict[str, int]:
    return {"rows": len(prediction.label_ids)}


def _without_mends(mended: bool) -> ExitStack:
    """Take SMTTrainer's overrides away where asked, so that a test can show what they are for."""
    stack = ExitStack()
    if not mended:
        for name in MENDS:
            stack.enter_context(mock.patch.object(SMTTrainer, name, getattr(Trainer, name)))
    return stack
