"""Skip a step with NaN or infinity on all ranks, or stop the run.

A loss that isn't finite makes its gradients NaN, so that one question remains: is the global gradient norm finite? It
has the same bits on all ranks. ``ShardedBlockOptimizer`` and DeepSpeed's optimizers then leave masters, moments and
counters alone and say so in ``overflow``; this callback counts, finds out whose number it was, and decides.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.optimization import GreedyLR

from smt_dist.config import NonFiniteConfig
from smt_dist.distributed import get_world_size, is_distributed
from smt_dist.engines.base import unwrapped
from smt_dist.errors import SMTError
from smt_dist.sparse.surgery import sparse_layers

logger = logging.getLogger(__name__)

SKIPPED = "skipped_steps"


def nan_gradients_if_non_finite(loss: torch.Tensor) -> torch.Tensor:
    """Make the gradients of a loss that isn't finite NaN; the loss keeps its bits."""
    still = loss.detach()
    return loss * (1 + (still - still))


class NonFiniteCallback(TrainerCallback):
    """Watch losses and block gradients; see the module.

    Args:
        config: the policy.

    Attributes:
        skipped: steps skipped since the run's first launch; kept in each checkpoint's log history.
        in_a_row: of these, up to the last step.
    """

    def __init__(self, config: NonFiniteConfig) -> None:
        self.config = config
        self.skipped, self.in_a_row = 0, 0
        self._losses: list[torch.Tensor] = []
        self._gradients: list[tuple[str, torch.Tensor]] = []
        self._hooks: list[Any] = []

    def note_loss(self, loss: torch.Tensor) -> None:
        """Note the loss of this rank's next micro-batch."""
        self._losses.append(loss.detach())

    # -- Trainer's events ----------------------------------------------------------------------------------------

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        model: nn.Module,
        **_: Any,
    ) -> None:
        self.skipped = max((int(entry.get(SKIPPED, 0)) for entry in state.log_history), default=0)
        for name, layer in sparse_layers(model).items():
            self._hooks.append(layer.delta.register_hook(lambda gradient, name=name: self._note(name, gradient)))

    def on_train_end(self, *_: Any, **__: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        optimizer: Any,
        lr_scheduler: Any,
        **_: Any,
    ) -> None:
        skipped = bool(unwrapped(optimizer).overflow)
        try:
            if skipped:
                self._skip(state)
                # The step counts: data and schedule go on. Trainer's rule for DeepSpeed is to hold the schedule.
                if args.deepspeed and not isinstance(lr_scheduler, ReduceLROnPlateau | GreedyLR):
                    lr_scheduler.step()
        finally:
            self.in_a_row = self.in_a_row if skipped else 0
            self._losses.clear()
            self._gradients.clear()

    # -- a non-finite step ---------------------------------------------------------------------------------------

    def _note(self, name: str, gradient: torch.Tensor) -> None:
        self._gradients.append((name, torch.linalg.vector_norm(gradient.detach(), torch.inf)))

    def _skip(self, state: TrainerState) -> None:
        self.skipped += 1
        self.in_a_row += 1
        step = state.global_step + 1
        state.log_history.append({SKIPPED: self.skipped, "step": step})
        found = f"step {step}: {self._whose()}"
        if self.config.policy == "stop":
            raise SMTError(
                f"{found}; nothing of this step was applied. non_finite.policy in the SMT config is 'stop'; 'skip' "
                "goes on without such steps"
            )
        if self.in_a_row > self.config.limit:
            raise SMTError(
                f"{found}; {self.in_a_row} steps in a row were not finite, more than non_finite.limit "
                f"({self.config.limit}) in the SMT config; nothing of them was applied"
            )
        logger.warning("%s; the step is skipped on all ranks (%d so far)", found, self.skipped)

    def _whose(self) -> str:
        """Describe each rank's first non-finite value; collective."""
        own = self._own()
        everyone = [own]
        if is_distributed():
            everyone = [None] * get_world_size()
            dist.all_gather_object(everyone, own)
        found = [f"rank {rank}: {said}" for rank, said in enumerate(everyone) if said is not None]
        return "; ".join(found) or "the gradient's norm over all ranks is not finite"

    def _own(self) -> str | None:
        for index, loss in enumerate(self._losses, 1):
            if not loss.isfinite():
                return f"the loss of micro-batch {index} is {float(loss)}"
        for name, peak in self._gradients:
            if not peak.isfinite():
                return f"the gradient of {name} is not finite (NaN or infinity)"
        return None
