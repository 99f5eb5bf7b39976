"""Measures the optimizer's tensors after one real step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from smt_dist.distributed import get_world_size
from smt_dist.training.trainer import state_bytes_per_rank
from workers.runs import engine_arguments
from workers.training import engine_type, fixed_data, make_trainer, release


def measure(folder: Path, model: str, runs: list[list[str]]) -> list[dict[str, Any]]:
    """Each run: engine and dtype."""
    return [_measure(folder / f"run{index}", model, *run) for index, run in enumerate(runs)]


def _measure(folder: Path, model: str, engine: str, dtype: str) -> dict[str, Any]:
    with engine_arguments(engine, folder, dtype=dtype, max_steps=1) as args:
        trainer = make_trainer(model, args, fixed_data())
        trainer.train()
        torch_optimizer = _torch_optimizer(trainer.optimizer)
        # This rank's flat fp32 partitions, one for each learning rate.
        masters = list(torch_optimizer.state)
        moments = [
            value for state in torch_optimizer.state.values() for value in state.values() if torch.is_tensor(value)
        ]
        result = {
            "world_size": get_world_size(),
            "engine": engine_type(trainer),
            "torch_optimizer": type(torch_optimizer).__name__,
            "base_dtypes": sorted({str(p.dtype) for n, p in trainer.model.named_parameters() if "delta" not in n}),
            "master_dtypes": sorted({str(master.dtype) for master in masters}),
            "bytes": _bytes(masters) + _bytes([moment for moment in moments if moment.dim()]),
            "step_counters": sum(moment.dim() == 0 for moment in moments),
            "said": state_bytes_per_rank(trainer.model),
            "selected": trainer.model.smt.selection.parameters,
            "tensors": len(masters),
            "frozen_gradients": sum(p.grad is not None for p in trainer.model.parameters() if not p.requires_grad),
            "trainable": sorted(n for n, p in trainer.model.named_parameters() if p.requires_grad),
        }
        release(trainer)
        return result


def _torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The innermost optimizer: accelerate wraps DeepSpeed's or ours, which wraps torch's."""
    while hasattr(optimizer, "optimizer") or hasattr(optimizer, "inner"):
        optimizer = getattr(optimizer, "optimizer", None) or optimizer.inner
    return optimizer


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
