"""Save the base that a full fine-tuning warm-up has changed, beside the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smt_dist.checkpoint.atomic import Save
from smt_dist.distributed import get_rank, write_on_rank_zero
from smt_dist.files import save_tokenizer
from smt_dist.sparse.sharded import gathered

MOVED_BASE = "moved_base"  # a folder beside the checkpoints


def save_moved_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save the base that the warm-up has changed as an ordinary model folder; collective.

    The folder is written whole or not at all.

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
    """Gather all weights and buffers on rank 0's CPU; other ranks get an empty dict."""
    state: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        with gathered(parameter) as weight:
            if get_rank() == 0:
                state[name] = weight.detach().cpu().clone()
    if get_rank() == 0:
        kept = model.state_dict().keys()
        state |= {name: buffer.detach().cpu() for name, buffer in model.named_buffers() if name in kept}
    return state
