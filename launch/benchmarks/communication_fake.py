"""Counts the collectives of a training step of large models: fake tensors on the fake process group, no memory.

All but the values is real: FSDP2 and ShardedBlockOptimizer run at full depth and call their collectives. DDP doesn't
run on fake tensors; see ``_ddp_step``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from communication_ranks import spread_blocks, summarize
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from smt_dist import apply_selection
from smt_dist.engines.fsdp2 import FSDP2Engine
from smt_dist.engines.replicated import ReplicatedBlocks, adamw_step
from smt_dist.memory.plan.collectives import CollectiveCounter
from smt_dist.memory.plan.fake import fake_group
from smt_dist.models.chunked_loss import chunk_loss
from smt_dist.training.trainer import block_parameter_groups

NODE = 8  # ranks
FRACTION = 0.0084
# Four of the usual 256 x 256 blocks in a row: a quarter of the operations; bytes depend on the number of elements only.
BLOCK = (1024, 256)
# Name -> ranks, and the shape as published.
MODELS: dict[str, tuple[int, dict[str, int]]] = {
    "llama-2-7b": (
        8,
        {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 32000,
        },
    ),
    "llama-3-70b": (
        64,
        {
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
    ),
}


def plan(models: list[str], engines: list[str]) -> list[tuple[str, str, str]]:
    """(model, engine, method) of every row that is counted; hsdp needs more than one node."""
    return [
        (model, engine, method)
        for model in models
        for engine in ("ddp", "fsdp2", "hsdp")
        if engine in engines and (engine != "hsdp" or MODELS[model][0] > NODE)
        for method in ("smt", "full")
    ]


def count(name: str, engine: str, method: str, layers: int | None = None) -> dict[str, Any]:
    """One row: the collectives of the second step.

    Args:
        name: of :data:`MODELS`.
        engine: ``ddp``, ``fsdp2`` or ``hsdp`` (one replica a node).
        method: ``smt``, or ``full``: AdamW over all weights, not clipped.
        layers: instead of the model's own.
    """
    ranks, shape = MODELS[name]
    shape = shape | ({"num_hidden_layers": layers} if layers else {})
    with fake_group(ranks):
        replicas = {"ddp": ranks, "fsdp2": 1, "hsdp": ranks // NODE}[engine]
        config = LlamaConfig(**shape, dtype=torch.bfloat16)
        with _sharding(config, replicas) as shard, FakeTensorMode():
            model = shard(LlamaForCausalLM._from_config(config)).train()
            parameters = sum(parameter.numel() for parameter in model.parameters())
            embedding = model.get_input_embeddings().weight.numel()
            step = smt_step(model, engine) if method == "smt" else full_step(model, engine)
            step()
            with CollectiveCounter() as counter:
                step()
    summary = summarize(counter.collectives, 1, model if method == "smt" else None, ranks, trained=parameters)
    names = {"model": name, "ranks": ranks, "engine": engine, "method": method, "layers": shape["num_hidden_layers"]}
    return names | {"parameters": parameters, "embedding": embedding, "source": "counted"} | summary


def sizes(name: str) -> tuple[int, int]:
    """(parameters of the base, elements that SMT trains), without counting anything."""
    with FakeTensorMode():
        model = LlamaForCausalLM._from_config(LlamaConfig(**MODELS[name][1], dtype=torch.bfloat16))
    return sum(parameter.numel() for parameter in model.parameters()), spread_blocks(model, FRACTION, BLOCK).parameters


def smt_step(model: PreTrainedModel, engine: str) -> Callable[[], None]:
    """A step of the blocks as SMTTrainer's is, with clipping, without its counts of tokens and its logs."""
    selection = spread_blocks(model, FRACTION, BLOCK)
    sharded = engine != "ddp"
    if sharded:
        FSDP2Engine(torch.float32).prepare_base(model)
    chunk_loss(model, targets=selection.blocks)
    # The fingerprint would read the weights, which have no values.
    device = torch.device("cpu")
    apply_selection(model, selection, dtype=torch.bfloat16, fingerprint="fake", device=device)
    blocks = ReplicatedBlocks(micro_batches=1 if sharded else None)
    optimizer = blocks.make_optimizer(block_parameter_groups(model, 1e-4, 0.0), torch.optim.AdamW, {})

    def step() -> None:
        _loss(model).backward()
        optimizer.clip_grad_norm_(1.0)
        optimizer.step()

    return step


def full_step(model: PreTrainedModel, engine: str) -> Callable[[], None]:
    """A step of all weights, as ``Engine.full_finetuning`` makes it."""
    if engine == "ddp":
        return _ddp_step(model)
    with FSDP2Engine(torch.float32).full_finetuning(model, 1e-4, accumulation=1) as tuning:

        def step() -> None:
            tuning.backward(_loss(tuning.forward))
            tuning.step()

        return step


def _ddp_step(model: PreTrainedModel) -> Callable[[], None]:
    """What DDP does: its reducer reads values, so its buckets are all-reduced here, cut by its own function.

    Left out are a few hundred bytes: the broadcast of buffers and the map of used parameters.
    """
    parameters = list(model.parameters())
    limits = [dist._DEFAULT_FIRST_BUCKET_BYTES, 25 * 2**20]  # DDP's defaults
    buckets, _ = dist._compute_bucket_assignment_by_size(parameters, limits)
    end = adamw_step(model, 1e-4, accumulation=1)

    def step() -> None:
        _loss(model).backward()
        for bucket in reversed(buckets):
            dist.all_reduce(torch.cat([parameters[index].grad.flatten() for index in bucket]))
        end()

    return step


def _loss(forward: Callable[..., Any]) -> torch.Tensor:
    tokens = torch.zeros(1, 16, dtype=torch.long)  # weights and gradients are moved, activations aren't
    return forward(input_ids=tokens, labels=tokens, use_cache=False).loss


@contextmanager
def _sharding(config: LlamaConfig, replicas: int) -> Iterator[Callable[[nn.Module], Any]]:
    """What shards a model as transformers does when it loads one. The mesh is made outside of fake tensors."""
    if replicas == dist.get_world_size():
        yield lambda model: model
        return
    options = FSDP2Engine(torch.float32, replicas).load_options(config, torch.bfloat16)["distributed_config"]
    options, _, mesh = LlamaForCausalLM.prepare_distribute_model(options)
    yield lambda model: LlamaForCausalLM.maybe_distribute_model(model, options, mesh)
