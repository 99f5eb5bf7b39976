"""Lists the collectives of SMTTrainer's steps, and those of the same base without blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.distributed.distributed_c10d import _coalescing_manager
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel, TrainerCallback

from smt_dist.data.batches import warmup_batches
from smt_dist.distributed import get_rank, get_world_size
from smt_dist.engines import make_engine
from smt_dist.memory.plan.collectives import Collective, CollectiveCounter
from smt_dist.models.chunked_loss import chunk_loss
from smt_dist.training.arguments import SMTTrainingArguments
from smt_dist.training.pipeline import attach_blocks
from smt_dist.training.trainer import SMTTrainer
from workers.runs import engine_arguments, load_model
from workers.training import engine_type, fixed_config, fixed_data, fixed_selection, release

# DeepSpeed's ranks compare the order of the weights in the second step.
WARM_STEPS, STEPS = 2, 2
Call = tuple[str, int, str]


def count_steps(folder: Path, model: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Each run: ``engine``, ``accumulation``, and whether a second all-reduce is added on purpose (``leak``)."""
    found = [_count(folder / f"run{index}", model, **run) for index, run in enumerate(runs)]
    return {"runs": found, "operators": every_operator() if get_world_size() == 2 else {}}


def _count(folder: Path, model_folder: str, engine: str, accumulation: int, leak: bool) -> dict[str, Any]:
    options = {"dtype": "bfloat16", "max_steps": WARM_STEPS + STEPS, "max_grad_norm": 0.5}
    with engine_arguments(engine, folder, accumulation, **options) as args:
        model = load_model(model_folder, args)
        chunk_loss(model, args.loss_chunk_size)  # as attach_blocks will
        base = frozen_base(model, args)
        attach_blocks(model, fixed_selection(), fixed_config(), args)
        data, counter = fixed_data(), CollectiveCounter()
        ends = _StepEnds(counter, leak)
        trainer = SMTTrainer(model, args, train_dataset=data.train, data_collator=data.collator, callbacks=[ends])
        with profile(activities=[ProfilerActivity.CPU]) as profiler, counter:
            trainer.train()
        blocks = dict(trainer.engine.read_blocks(trainer.model, trainer.optimizer))
        result = {
            "world_size": get_world_size(),
            "engine": engine_type(trainer),
            "base": as_tuples(base),
            "steps": [
                as_tuples(counter.collectives[start:end])
                for start, end in zip(ends.ends[WARM_STEPS - 1 :], ends.ends[WARM_STEPS:], strict=False)
            ],
            "counted": len(counter.collectives),
            "profiled": _gloo_calls(profiler),
            "moved": min(float(block.abs().max()) for block in blocks.values()),
        }
        release(trainer)
        return result


class _StepEnds(TrainerCallback):
    """Where in the list of collectives each step ended; adds an all-reduce of the blocks to each, if told to."""

    def __init__(self, counter: CollectiveCounter, leak: bool) -> None:
        self.counter, self.leak = counter, leak
        self.ends: list[int] = []

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        if self.leak:
            dist.all_reduce(torch.zeros(fixed_selection().parameters))

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.ends.append(len(self.counter.collectives))


def frozen_base(model: PreTrainedModel, args: SMTTrainingArguments) -> list[Collective]:
    """The collectives of one micro-batch's forward, and backward down to the embeddings, of the frozen base."""
    model.requires_grad_(False).train()
    model.enable_input_require_grads()
    batches = warmup_batches(fixed_data(), args.batch_order, steps=1 + WARM_STEPS)
    with make_engine(args.engine_options).scoring(model):
        for micro_batches in batches:
            with CollectiveCounter() as counter:
                model(**micro_batches[0], use_cache=False).loss.backward()
    model.disable_input_require_grads()
    return counter.collectives


def as_tuples(collectives: list[Collective]) -> list[Call]:
    """What a result may hold."""
    return [(call.kind, call.bytes, str(call.dtype)) for call in collectives]


def _gloo_calls(profiler: profile) -> int:
    """How many calls gloo itself recorded, whoever made them."""
    # Reading the raw events spares the profiler's own analysis, which takes seconds.
    return sum(event.name().startswith("gloo:") for event in profiler.profiler.kineto_results.events())


def every_operator() -> dict[str, Any]:
    """Each way to call a collective, once, on two ranks; forward, backward, functional, coalesced, objects, DDP."""
    x, wide = torch.ones(8), torch.ones(16)
    world = dist.group.WORLD

    def coalesced(call: Any, *tensors: tuple[torch.Tensor, ...]) -> None:
        with _coalescing_manager():
            for group in tensors:
                call(*group)

    def ddp() -> None:
        wrapped = DistributedDataParallel(torch.nn.Linear(4, 4))
        wrapped(torch.ones(2, 4)).sum().backward()

    ways = {
        "all_reduce": lambda: dist.all_reduce(x),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(wide, x),
        "all_gather": lambda: dist.all_gather([torch.empty(8), torch.empty(8)], x),
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(torch.empty(4), x),
        "broadcast": lambda: dist.broadcast(x, 0),
        "reduce": lambda: dist.reduce(x, 0),
        "gather": lambda: dist.gather(x, [torch.empty(8), torch.empty(8)] if get_rank() == 0 else None, 0),
        "scatter": lambda: dist.scatter(x, [torch.ones(8), torch.ones(8)] if get_rank() == 0 else None, 0),
        "all_to_all_single": lambda: dist.all_to_all_single(torch.empty(8), x),
        "barrier": dist.barrier,
        "message": lambda: dist.send(x, 1) if get_rank() == 0 else dist.recv(x, 0),
        "functional all_reduce": lambda: functional.all_reduce(x, "sum", world) + 0,
        "functional gather, and its backward": lambda: (
            functional.all_gather_tensor_autograd(x.clone().requires_grad_(), 0, world).sum().backward()
        ),
        "coalesced all_reduce": lambda: coalesced(dist.all_reduce, (x,), (wide,)),
        "coalesced gather": lambda: coalesced(dist.all_gather_into_tensor, (wide, x), (torch.empty(32), wide)),
        "objects": lambda: dist.all_gather_object([None, None], "text"),
        "DDP": ddp,
    }
    found = {}
    for name, way in ways.items():
        with profile(activities=[ProfilerActivity.CPU]) as profiler, CollectiveCounter() as counter:
            way()
        found[name] = {"calls": as_tuples(counter.collectives), "profiled": _gloo_calls(profiler)}
    return found
