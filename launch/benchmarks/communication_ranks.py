"""Counts the collectives of training steps on real gloo ranks; ``communication.py`` starts one a rank.

SMT's steps are SMTTrainer's, with all that Trainer itself communicates (token counts, logs). Full fine-tuning's are the
engine's own, without a Trainer around them and without clipping.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    TrainerCallback,
)

from smt_dist import BlockSelection, SMTConfig
from smt_dist.checkpoint.adapter import config_of
from smt_dist.cli.program import configure_logging, run_program
from smt_dist.data.dataset import CausalLMCollator
from smt_dist.distributed import get_rank, get_world_size
from smt_dist.engines import make_engine
from smt_dist.memory.plan.collectives import Collective, CollectiveCounter, totals
from smt_dist.sparse.sharded import full_numel
from smt_dist.sparse.surgery import sparse_layers
from smt_dist.sparse.targets import count_parameters_2d, find_targets, weight_shape
from smt_dist.training.arguments import SMTTrainingArguments
from smt_dist.training.pipeline import attach_blocks
from smt_dist.training.trainer import SMTTrainer

FRACTION = 0.0084
BLOCK = (32, 32)
SHAPE = {"hidden_size": 256, "intermediate_size": 704, "num_attention_heads": 4, "vocab_size": 1000}
# The first step sets up; in the second, DeepSpeed's ranks compare the order of weights that the first one found.
WARM_STEPS = 2
# A small model fits into ZeRO-3's caches whole; like this every forward and backward gathers, as in a large one.
ZERO3 = {
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 0,
    "stage3_param_persistence_threshold": 0,
}


def engine_flags(engine: str) -> dict[str, Any]:
    """The flags for ``ddp``, ``fsdp2``, ``hsdp`` (two replicas), ``zero1``, ``zero2`` or ``zero3``."""
    if engine.startswith("zero"):
        stage = int(engine.removeprefix("zero"))
        return {"deepspeed": {"zero_optimization": {"stage": stage, **(ZERO3 if stage == 3 else {})}}}
    return {"engine": "fsdp2", "dp_replicate_size": 2} if engine == "hsdp" else {"engine": engine}


def spread_blocks(model: PreTrainedModel, fraction: float, block_size: tuple[int, int]) -> BlockSelection:
    """``fraction`` of the 2-D parameters in blocks, spread evenly over q, k and v of all layers."""
    names = find_targets(model, SMTConfig())["attention"]
    shapes = {name: weight_shape(model.get_submodule(name)) for name in names}
    count = round(fraction * count_parameters_2d(model) / (block_size[0] * block_size[1]))
    blocks: dict[str, list[tuple[int, int]]] = {}
    for index in range(max(1, count)):
        name = names[index % len(names)]
        blocks.setdefault(name, []).append(divmod(index // len(names), shapes[name][1] // block_size[1]))
    return BlockSelection(block_size=block_size, blocks=blocks, shapes={name: shapes[name] for name in blocks})


def summarize(
    collectives: list[Collective], steps: int, model: nn.Module | None, ranks: int, trained: int = 0
) -> dict[str, Any]:
    """What a step moves: by kind, in all, and the blocks' part of it, which their sizes tell.

    Args:
        collectives: of ``steps`` steps.
        steps: their number.
        model: with the blocks; None where there are none.
        ranks: that hold them together.
        trained: elements, where there are no blocks.
    """
    sizes: set[int] = set()
    if model is not None:
        deltas = [layer.delta for layer in sparse_layers(model).values()]
        trained = sum(full_numel(delta) for delta in deltas)
        padded = -(-trained // ranks) * ranks
        width = deltas[0].element_size()
        sizes = {4 * padded, width * padded} | {width * full_numel(delta) for delta in deltas}
    return {
        "trained": trained,
        "steps": steps,
        "kinds": _as_json(collectives, steps),
        # Under fsdp2 their gradients go to one rank after the other, and nothing else does.
        "blocks": _as_json([call for call in collectives if call.bytes in sizes or call.kind == "reduce"], steps),
    }


def _as_json(collectives: Iterable[Collective], steps: int) -> dict[str, dict[str, float]]:
    return {kind: total._asdict() for kind, total in totals(collectives, steps).items()}


class _StepEnds(TrainerCallback):
    """Where in the list of collectives each step ended."""

    def __init__(self, counter: CollectiveCounter) -> None:
        self.counter = counter
        self.ends: list[int] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(len(self.counter.collectives))


def count_smt(model: PreTrainedModel, args: SMTTrainingArguments, rows: datasets.Dataset) -> list[Collective]:
    """The collectives of SMTTrainer's steps, from the end of the warm ones to the end of the last."""
    counter = CollectiveCounter()
    steps = _StepEnds(counter)
    trainer = SMTTrainer(model, args, train_dataset=rows, data_collator=CausalLMCollator(0), callbacks=[steps])
    with counter:
        trainer.train()
    if hasattr(trainer.model_wrapped, "destroy"):  # DeepSpeed
        trainer.model_wrapped.destroy()
    return counter.collectives[steps.ends[WARM_STEPS - 1] : steps.ends[-1]]


def count_full(model: PreTrainedModel, args: SMTTrainingArguments, rows: datasets.Dataset) -> list[Collective]:
    """The collectives of as many steps of full fine-tuning, after as many warm ones."""
    batch = CausalLMCollator(0)([rows[0]])
    warm = 0
    model.requires_grad_(True).train()
    counter = CollectiveCounter()
    with make_engine(args.engine_options).full_finetuning(model, args.learning_rate, accumulation=1) as tuning, counter:
        for step in range(args.max_steps):
            tuning.backward(tuning.forward(**batch, use_cache=False).loss)
            tuning.step()
            if step == WARM_STEPS - 1:
                warm = len(counter.collectives)
        last = len(counter.collectives)
    return counter.collectives[warm:last]


def make_model(folder: Path, layers: int) -> None:
    """A random Llama on disk, which every rank loads as its engine wants it."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=layers)).save_pretrained(folder)


def count_engine(engine: str, model: Path, output: Path, dtype: str, steps: int) -> list[dict[str, Any]]:
    """SMT's row and full fine-tuning's, on this rank."""
    args = SMTTrainingArguments(
        output_dir=str(output),
        dtype=dtype,
        max_steps=WARM_STEPS + steps,
        per_device_train_batch_size=1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **engine_flags(engine),
    )
    args.set_up_process_group()
    ids = list(range(3, 35))
    rows = [{"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)}] * (args.max_steps * get_world_size())
    results = []
    for method in ("smt", "full"):
        engine_instance = make_engine(args.engine_options)
        options = engine_instance.load_options(AutoConfig.from_pretrained(model), args.base_dtype)
        base = AutoModelForCausalLM.from_pretrained(model, dtype=args.base_dtype, **options)
        engine_instance.prepare_base(base)
        parameters = sum(full_numel(parameter) for parameter in base.parameters())
        names = {"engine": engine, "method": method, "ranks": get_world_size(), "parameters": parameters}
        if method == "smt":
            selection = spread_blocks(base, FRACTION, BLOCK)
            attach_blocks(base, selection, config_of(selection), args)
            calls = count_smt(base, args, datasets.Dataset.from_list(rows))
            summary = summarize(calls, steps, base, get_world_size())
        else:
            calls = count_full(base, args, datasets.Dataset.from_list(rows))
            summary = summarize(calls, steps, None, get_world_size(), trained=parameters)
        results.append(names | summary)
    return results


def main() -> None:
    """One rank of one engine; rank 0 writes what it found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine")
    parser.add_argument("folder", type=Path, help="holds the model; the result goes there")
    parser.add_argument("dtype")
    parser.add_argument("steps", type=int)
    given = parser.parse_args()
    configure_logging()
    warnings.simplefilter("ignore")
    folder = given.folder
    results = count_engine(given.engine, folder / "model", folder / given.engine, given.dtype, given.steps)
    if get_rank() == 0:
        (folder / f"{given.engine}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    run_program(main)
