"""The loss of one micro-batch and its gradient, plain and in chunks, by one engine after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from smt_dist.distributed import get_rank, get_world_size
from smt_dist.engines import make_engine
from smt_dist.engines.fsdp2 import FSDP2Engine
from smt_dist.memory.plan.collectives import CollectiveCounter
from smt_dist.models.chunked_loss import IGNORED, ChunkedLossHead, chunk_loss
from workers.runs import engine_arguments, load_model

CHUNK = 17  # divides neither the vocabulary nor a rank's part of it
TOKENS = (2, 9)


def compare(folder: Path, model: str, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each run: ``engine``, ``dtype`` and more flags; what it finds with whole logits and in chunks."""
    return [_compare(folder / f"run{index}", model, **run) for index, run in enumerate(runs)]


def _compare(folder: Path, model_folder: str, engine: str, dtype: str, **options: Any) -> dict[str, Any]:
    with engine_arguments(engine, folder, dtype=dtype, **options) as args:
        found = {}
        for entries in (0, CHUNK):
            model = load_model(model_folder, args)
            vocabulary = model.config.vocab_size
            if args.activation_checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
                model.disable_input_require_grads()
            model.requires_grad_(False).train()
            assert chunk_loss(model, entries) == (entries > 0)
            with make_engine(args.engine_options).scoring(model), CollectiveCounter() as counter:
                cases = {name: _loss(model, vocabulary, **case) for name, case in CASES.items()}
            gathers = [call.bytes for call in counter.collectives if call.kind == "all_gather"]
            found["chunked" if entries else "plain"] = {"cases": cases, "largest_gather": max(gathers, default=0)}
        return found | {
            "world_size": get_world_size(),
            "head": type(model.get_output_embeddings()).__name__,
            "units": sum(isinstance(module, FSDPModule) for module in model.modules()),
            "gathered_after": _gathered(model),
        }


CASES: dict[str, dict[str, Any]] = {
    "masked labels, count given": {"masked": 4, "items": 11},
    "no label masked, mean": {"masked": 0, "items": None},
    "every label masked": {"masked": 9, "items": 5},
}


def _loss(model: nn.Module, vocabulary: int, masked: int, items: int | None) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(get_rank())
    labels = torch.randint(3, vocabulary, TOKENS, generator=generator)
    labels[:, :masked] = IGNORED
    hidden = model.config.hidden_size
    inputs = torch.randn(*TOKENS, hidden, generator=generator).to(model.dtype).requires_grad_()
    extra = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    output = model(inputs_embeds=inputs, labels=labels, use_cache=False, **extra)
    output.loss.backward()
    whole = isinstance(model.get_output_embeddings(), ChunkedLossHead)
    assert (output.logits is None) == whole
    return {"loss": output.loss.detach().float(), "gradient": inputs.grad.float()}


def _gathered(model: nn.Module) -> list[str]:
    """The layers' weights that lie there whole although no forward or backward runs."""
    names = (name for name, _ in model.named_parameters() if ".layers." in name and name.endswith("_proj.weight"))
    return [name for name in names if not hasattr(model.get_parameter(name), "full_tensor")]


def recompute(folder: Path, model: str) -> dict[str, int]:
    """The most weights of one layer that were gathered at once in a backward with recomputation, by kind of unit."""
    found = {}
    for units, prefetch in (("layer", False), ("weight", False), ("weight", True)):
        flags = {"fsdp2_units": units, "fsdp2_prefetch": prefetch}
        with engine_arguments("fsdp2", folder / units, activation_checkpointing=True, **flags) as args:
            assert isinstance(make_engine(args.engine_options), FSDP2Engine)
            base = load_model(model, args)
            base.gradient_checkpointing_enable({"use_reentrant": False})
            base.disable_input_require_grads()
            base.requires_grad_(False).train()
            weights = [name for name in dict(base.named_parameters()) if ".layers.0." in name and "_proj" in name]
            most = 0

            def look(*_: Any, base: nn.Module = base, weights: list[str] = weights) -> None:
                nonlocal most
                whole = [name for name in weights if not hasattr(base.get_parameter(name), "full_tensor")]
                most = max(most, len(whole))

            inputs = torch.randn(*TOKENS, base.config.hidden_size).requires_grad_()
            loss = base(inputs_embeds=inputs, labels=torch.ones(TOKENS, dtype=torch.long), use_cache=False).loss
            for module in base.model.layers[0].modules():
                if isinstance(module, nn.Linear):
                    module.register_forward_hook(look)
            loss.backward()
            found[f"{units}, prefetch {prefetch}"] = most
    return found
