"""One real training step or warm-up step of a small model, and the peak of what its allocator gave out."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from smt_dist import SMTConfig, apply_selection
from smt_dist.chunked_loss import chunk_loss
from smt_dist.distributed import get_world_size
from smt_dist.engines.fsdp2 import FSDP2Engine
from smt_dist.engines.replicated import ReplicatedBlocks
from smt_dist.memory.request import Request
from smt_dist.memory.spread import even_counts, measure_shape, selection_of
from smt_dist.trainer import block_parameter_groups
from smt_dist.warmup import collect_scores

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4000,
}
SMT = {"block_size": 32, "groups": [{"fraction": 0.01}], "warmup": {"steps": 1}}


def small_request(**changes: Any) -> Request:
    smt = SMTConfig.model_validate(SMT | changes.pop("smt", {}))
    model = LlamaConfig(**(SHAPE | changes.pop("shape", {})))
    return Request(**({"model": model, "smt": smt, "batch": 4, "sequence": 128} | changes))


def measure(folder: Path, cells: list[dict[str, Any]]) -> list[dict[str, int]]:
    """The peak of each cell on this rank: bytes of a ``training`` step and of a ``warmup`` step."""
    del folder
    return [_measure_cell(small_request(**cell)) for cell in cells]


def _measure_cell(request: Request) -> dict[str, int]:
    torch.manual_seed(0)
    model = _load(request)
    found = {}
    batch = {"input_ids": torch.zeros(request.batch, request.sequence, dtype=torch.long)}
    batch["labels"] = batch["input_ids"].clone()
    if request.method == "smt":
        # Its accumulators are made inside, so that all it holds beyond the model is counted.
        found["warmup"] = _peak(lambda: collect_scores(model, [[batch, batch]], request.smt), [*_held(model)])
    step, state = _PREPARE[request.method](model, request)

    def train() -> None:
        tokens = request.batch * request.sequence
        model(**batch, use_cache=False, num_items_in_batch=tokens).loss.backward()
        step()

    train()
    gc.collect()
    found["training"] = _peak(train, [*_held(model), *state()])
    found["parameters"] = sum(p.numel() for p in model.parameters())
    return found


def _load(request: Request) -> nn.Module:
    config = request.at_depth(request.layers)
    config.use_cache = False
    model = LlamaForCausalLM._from_config(config, dtype=request.base_dtype).train()
    if request.engine == "fsdp2" and get_world_size() > 1:
        engine = FSDP2Engine(torch.float32, units=request.units, prefetch=request.prefetch)
        options = engine.load_options(config, request.base_dtype)["distributed_config"]
        if request.method == "full":
            options.fsdp_plan = None  # as transformers has it
        options, _, mesh = LlamaForCausalLM.prepare_distribute_model(options)
        model = LlamaForCausalLM.maybe_distribute_model(model, options, mesh)
        if request.method == "smt":
            engine.prepare_base(model)
    if request.method == "smt":
        chunk_loss(model, request.loss_chunk)
    if request.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.disable_input_require_grads()
    return model


def _prepare_smt(model: nn.Module, request: Request) -> tuple[Callable[[], None], Callable[[], list]]:
    shape = measure_shape(request)
    counts, _ = even_counts(shape)
    selection = selection_of(counts, shape.grids, request.layers)
    apply_selection(model, selection, dtype=request.base_dtype, fingerprint="random", device=torch.device("cpu"))
    optimizer = ReplicatedBlocks(micro_batches=1 if request.engine == "fsdp2" else None).make_optimizer(
        block_parameter_groups(model, 1e-4, 0.0), torch.optim.AdamW, {"fused": True}
    )

    def step() -> None:
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()

    def state() -> list:
        moments = [value for values in optimizer.inner.state.values() for value in values.values()]
        return [*optimizer.gradients.tensors(), optimizer._flat.values, *optimizer._masters, *moments]

    return step, state


def _prepare_plain(parameters: list[nn.Parameter]) -> tuple[Callable[[], None], Callable[[], list]]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_(parameters, math.inf)
        optimizer.step()
        optimizer.zero_grad()

    return step, lambda: [value for values in optimizer.state.values() for value in values.values()]


def _prepare_full(model: nn.Module, request: Request) -> tuple[Callable[[], None], Callable[[], list]]:
    del request
    return _prepare_plain(list(model.parameters()))


def _prepare_lora(model: nn.Module, request: Request) -> tuple[Callable[[], None], Callable[[], list]]:
    from peft import LoraConfig, get_peft_model

    from smt_dist.memory.plan import _lora_rank

    rank = _lora_rank(measure_shape(request))
    get_peft_model(model, LoraConfig(r=rank, target_modules=["q_proj", "k_proj", "v_proj"], lora_dropout=0.0))
    return _prepare_plain([p for p in model.parameters() if p.requires_grad])


_PREPARE = {"smt": _prepare_smt, "full": _prepare_full, "lora": _prepare_lora}


def _held(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _peak(work: Callable[[], Any], held: list[torch.Tensor]) -> int:
    """Bytes that exist before, plus the most that ``work`` adds, as the CPU profiler saw the allocator."""
    local = [tensor._local_tensor if isinstance(tensor, DTensor) else tensor for tensor in held]
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in local}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        most = max(most, level)
    return sum(storages.values()) + most
