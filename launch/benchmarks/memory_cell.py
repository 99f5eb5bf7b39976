"""One small model, run for real on this rank under one engine, and what its memory was: a cell of the validation.

Steps are those of the planner: the warm-up's, and training's with clipping and AdamW, every row full.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from smt_dist.distributed import get_world_size, is_distributed
from smt_dist.engines import make_engine
from smt_dist.engines.base import Engine
from smt_dist.memory.plan.base import build_base, make_sharding
from smt_dist.memory.plan.categories import Memory
from smt_dist.memory.plan.plan import lora_rank
from smt_dist.memory.plan.request import Request
from smt_dist.memory.plan.spread import even_counts, measure_shape, selection_of
from smt_dist.memory.plan.trace import tensors_of
from smt_dist.memory.plan.trained import attach_lora
from smt_dist.memory.record.window import Window
from smt_dist.selection.warmup import collect_scores
from smt_dist.sparse.blocks import BlockSelection
from smt_dist.sparse.surgery import apply_selection
from smt_dist.training.arguments import SMTTrainingArguments
from smt_dist.training.trainer import block_parameter_groups

# The first makes the optimizer's state, which the second has from its beginning.
STEPS = 2
RATE = 1e-4


class Trained(NamedTuple):
    """What trains a model.

    Attributes:
        forward: keyword inputs -> outputs with a loss.
        backward: takes the loss.
        step: moves the weights.
        optimizer: its state is looked at.
        destroy: takes it all away.
    """

    forward: Callable[..., Any]
    backward: Callable[[torch.Tensor], Any]
    step: Callable[[], Any]
    optimizer: torch.optim.Optimizer
    destroy: Callable[[], Any]


def engine_arguments(request: Request, output_dir: str) -> SMTTrainingArguments:
    """``train.py``'s arguments for a request; the process group must not exist, or be that of these arguments."""
    flags: dict[str, Any] = {"engine": request.engine, "dp_replicate_size": request.replicas}
    if request.engine.startswith("zero"):
        flags = {"deepspeed": {"zero_optimization": {**request.zero, "stage": int(request.engine[-1])}}}
    return SMTTrainingArguments(
        output_dir=output_dir,
        dtype=request.dtype,
        per_device_train_batch_size=request.batch,
        report_to=[],
        disable_tqdm=True,
        **flags,
    )


def measure_cell(request: Request, output_dir: str) -> dict[str, tuple[str, Memory]]:
    """Phase (``load``, ``warmup`` for ``smt``, ``training``) -> (moment, what was held) at this rank's peak.

    Args:
        request: the run; its world size is the number of ranks there are.
        output_dir: for Trainer's arguments; nothing is written.
    """
    trainable = _trainable(request)
    args = engine_arguments(request, output_dir)
    args.set_up_process_group()
    if get_world_size() != request.world_size:
        raise RuntimeError(f"{get_world_size()} ranks run a request for {request.world_size}")
    torch.manual_seed(0)
    engine = make_engine(args.engine_options)
    window = Window()
    model = load_model(request)
    window.open("load", "loaded")
    window.register_model(model)
    try:
        _run(model, request, engine, args, window, trainable)
        timeline = window.close()
    finally:
        unset_hf_deepspeed_config()
    del model
    gc.collect()
    return timeline.peaks()


def _trainable(request: Request) -> BlockSelection | int | None:
    """The blocks, evenly spread, or LoRA's rank; on fake tensors, so before DeepSpeed partitions all that is built."""
    if request.method == "full":
        return None
    shape = measure_shape(request)
    if request.method == "lora":
        return lora_rank(shape)
    return selection_of(even_counts(shape)[0], shape.grids, request.layers)


def _run(
    model: PreTrainedModel,
    request: Request,
    engine: Engine,
    args: SMTTrainingArguments,
    window: Window,
    trainable: BlockSelection | int | None,
) -> None:
    batch = {"input_ids": torch.zeros(request.batch, request.sequence, dtype=torch.long)}
    batch["labels"] = batch["input_ids"].clone()
    window.watch(model)
    if request.method == "smt":
        window.mark("warmup", "preparing")
        with engine.scoring(model):
            window.register_model(model)
            collect_scores(
                model,
                [[batch, batch]],
                request.smt,
                observe=lambda accumulator, _: window.register([("statistics", tensors_of(accumulator))]),
            )
        gc.collect()
    window.mark("setup", "preparing")
    _attach(model, request, trainable)
    window.watch_gradients(model)
    trained = _train(model, request, engine, args)
    window.register_model(model, trained.optimizer)
    for _ in range(STEPS):
        gc.collect()
        window.mark("training", "forward embedding")
        with _autocast(request):
            tokens = request.batch * request.sequence
            loss = trained.forward(**batch, use_cache=False, num_items_in_batch=tokens).loss
        trained.backward(loss)
        window.register_model(model, trained.optimizer)
        window.mark("training", "step")
        trained.step()
        del loss
        window.register_model(model, trained.optimizer)
    window.mark("end", "end")
    trained.destroy()


def _autocast(request: Request) -> AbstractContextManager[Any]:
    """Full fine-tuning keeps fp32 weights and computes in bf16; FSDP2 and DeepSpeed cast by themselves."""
    mixed = request.base_dtype == torch.float32 and request.dtype == "bfloat16" and request.shards == 1
    return torch.autocast("cpu", torch.bfloat16) if mixed else nullcontext()


def load_model(request: Request) -> PreTrainedModel:
    """The base with random weights, as the engine holds it."""
    config = request.at_depth(request.layers)
    config.use_cache = False
    return build_base(request, config, make_sharding(request, config))


def _attach(model: PreTrainedModel, request: Request, trainable: BlockSelection | int | None) -> None:
    if isinstance(trainable, BlockSelection):
        apply_selection(model, trainable, dtype=request.base_dtype, fingerprint="random", device=torch.device("cpu"))
    elif trainable is not None:
        attach_lora(model, request, trainable)


def _train(model: PreTrainedModel, request: Request, engine: Engine, args: SMTTrainingArguments) -> Trained:
    if request.method == "smt":
        optimizer = engine.make_optimizer(block_parameter_groups(model, RATE, 0.0), torch.optim.AdamW, {"fused": True})
    else:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, fused=True)
    if request.engine.startswith("zero"):
        return _under_deepspeed(model, optimizer, args)
    return _under_torch(model, optimizer, request)


def _under_deepspeed(model: PreTrainedModel, optimizer: torch.optim.Optimizer, args: SMTTrainingArguments) -> Trained:
    import deepspeed

    config = {**args.filled_deepspeed_config(), "gradient_clipping": 1.0}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    return Trained(engine, engine.backward, engine.step, engine.optimizer, engine.destroy)


def _under_torch(model: PreTrainedModel, optimizer: torch.optim.Optimizer, request: Request) -> Trained:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wraps = request.engine == "ddp" and is_distributed() and request.method != "smt"
    forward = DistributedDataParallel(model) if wraps else model

    def step() -> None:
        if request.method == "smt":
            optimizer.clip_grad_norm_(1.0)
        else:
            torch.nn.utils.clip_grad_norm_(parameters, math.inf)
        optimizer.step()
        optimizer.zero_grad()

    return Trained(forward, torch.Tensor.backward, step, optimizer, lambda: None)
