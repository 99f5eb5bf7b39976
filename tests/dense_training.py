"""SMT's definition in plain PyTorch: whole weights get gradients, all but the blocks are masked, AdamW written out."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from tiny_models import label_tokens, sum_of_token_losses
from transformers import AutoModelForCausalLM, PreTrainedModel
from workers.runs import GLOBAL_BATCH
from workers.training import (
    BLOCK,
    BLOCKS,
    LEARNING_RATE,
    MAX_GRAD_NORM,
    MULTIPLIERS,
    STEPS,
    WEIGHT_DECAY,
    fixed_data,
    group_of,
)


class DenseRun(NamedTuple):
    """What the fixed training amounts to."""

    losses: list[float]
    gradient_norms: list[float]
    blocks: dict[str, torch.Tensor]  # module -> fp32 [blocks * block_rows, block_cols]


def masked_dense_training(model_folder: Path, dtype: torch.dtype = torch.float32) -> DenseRun:
    """Train :data:`BLOCKS` of a base in ``dtype`` with fp32 masters, one global batch at a time."""
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
    weights = {name: model.get_submodule(name).weight for name in BLOCKS}
    base = {name: weight.detach().float() for name, weight in weights.items()}
    deltas, first, second = ({name: torch.zeros_like(weight) for name, weight in base.items()} for _ in range(3))
    losses, norms = [], []
    for step in range(STEPS):
        loss = _backward(model, step)
        gradients = {name: weight.grad.float() * _mask(name, weight) for name, weight in weights.items()}
        norm = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm().item()
        losses.append(loss)
        norms.append(norm)
        for name, weight in weights.items():
            gradient = gradients[name] * min(1.0, MAX_GRAD_NORM / (norm + 1e-6))
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            rate = LEARNING_RATE * MULTIPLIERS[group_of(name)] * (1 - step / STEPS)
            moment = first[name] / (1 - 0.9 ** (step + 1))
            scale = (second[name] / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            decayed = deltas[name] * (1 - rate * WEIGHT_DECAY)  # decay pulls the model to its base
            deltas[name] = decayed - _mask(name, weight) * rate * moment / scale
            weight.data = (base[name] + deltas[name]).to(dtype)
    return DenseRun(losses, norms, {name: _blocks_of(name, delta) for name, delta in deltas.items()})


def _backward(model: PreTrainedModel, step: int) -> float:
    data = fixed_data()
    batch = data.collator([data.train[i] for i in range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)])
    model.zero_grad()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    loss = sum_of_token_losses(logits, batch["labels"]) / label_tokens(batch["labels"])
    loss.backward()
    return loss.item()


def _cells(name: str) -> list[tuple[slice, slice]]:
    return [
        (slice(row * BLOCK[0], (row + 1) * BLOCK[0]), slice(col * BLOCK[1], (col + 1) * BLOCK[1]))
        for row, col in BLOCKS[name]
    ]


def _mask(name: str, weight: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(weight.shape)
    for cell in _cells(name):
        mask[cell] = 1
    return mask


def _blocks_of(name: str, delta: torch.Tensor) -> torch.Tensor:
    return torch.cat([delta[cell] for cell in _cells(name)])
