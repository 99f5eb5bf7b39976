"""The authors' warm-up, for reproduction: real full fine-tuning whose gradients are scored as they pass.

Its peak memory is full fine-tuning's, and it moves the base: the blocks then belong to the moved base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smt_dist.config import SMTConfig
from smt_dist.distributed import get_rank, get_world_size, write_on_rank_zero
from smt_dist.engines.base import Engine, Tuning
from smt_dist.files import save_tokenizer
from smt_dist.saves import Save
from smt_dist.scores import BlockScores, make_accumulator
from smt_dist.sparse.sharded import gathered
from smt_dist.steps import Batch, Observer, run_steps
from smt_dist.warmup import build_scores, plan_grids, probe_modules


def collect_scores_full_ft(
    model: nn.Module,
    batches: Iterable[list[Batch]],
    config: SMTConfig,
    engine: Engine,
    learning_rate: float,
    accumulation: int = 1,
    progress: bool = False,
    observe: Observer | None = None,
) -> BlockScores:
    """Fully fine-tune ``model`` for ``config.warmup.steps`` steps and score the gradients.

    Args:
        model: moved in place; all its weights end frozen or not as :func:`apply_selection` wants.
        batches: as for :func:`collect_scores`.
        config: its score and targets.
        engine: trains the full model.
        learning_rate: of AdamW, constant.
        accumulation: micro-batches a global step.
        progress: show a progress bar on rank 0.
        observe: looks on from the beginning.

    Raises:
        SMTError: as :func:`collect_scores`.
    """
    groups, grids = plan_grids(model, config)
    accumulator = make_accumulator(config.selection.score, grids, next(model.parameters()).device)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.train()
    label = "warm-up (full fine-tuning)" if progress else None
    with engine.full_finetuning(model, learning_rate, accumulation) as tuning, probe_modules(model, accumulator, grids):
        steps = run_steps(model, _summed(tuning), batches, config.warmup.steps, accumulator, label, observe)
    tables = {name: table / get_world_size() for name, table in accumulator.tables().items()}
    return build_scores(model, config, groups, grids, tables, steps)


def _summed(tuning: Tuning) -> Tuning:
    """Engines average gradients over ranks; the loss's gradient is their sum. The scores are scaled back."""

    def backward(loss: torch.Tensor) -> None:
        tuning.backward(loss * get_world_size())

    return tuning._replace(backward=backward)


def save_moved_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the base as the warm-up moved it, an ordinary model folder, whole or not at all; collective.

    Weights are gathered one at a time; rank 0 holds them all, on the CPU.

    Raises:
        SMTError: it can't be written (a full disk); on all ranks.
    """
    save = Save(folder)

    def on_rank_zero(action: Callable[[], object]) -> None:
        write_on_rank_zero(action, str(folder), "saving the moved base")

    try:
        on_rank_zero(save.begin)
        if model.is_distributed_loading_by_transformers:  # fsdp2: its own save_pretrained gathers, on all ranks
            model.save_pretrained(save.folder)
        else:
            state = _gathered_state(model)
            on_rank_zero(lambda: model.save_pretrained(save.folder, state_dict=state))
        on_rank_zero(lambda: save_tokenizer(tokenizer, save.folder))
        on_rank_zero(save.commit)
    finally:
        save.close()


def _gathered_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """All weights and buffers on rank 0, on the CPU; nothing on the others."""
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        with gathered(parameter) as weight:
            if get_rank() == 0:
                state[name] = weight.detach().cpu().clone()
    if get_rank() == 0:
        kept = model.state_dict().keys()
        state |= {name: buffer.detach().cpu() for name, buffer in model.named_buffers() if name in kept}
    return state
