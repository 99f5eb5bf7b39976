"""Count each row and each trained token once, on any number of ranks.

In training and in evaluation.

accelerate fills the last batch up with the first rows, so that every rank has as many batches as the others; Trainer
trains these rows once more. Its evaluation loss is a mean of batch means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, IterableDatasetShard, SkipBatchSampler
from accelerate.state import GradientState

from smt_dist.data.dataset import IGNORED, trained_tokens
from smt_dist.distributed import all_reduce_sum, collective_device, get_rank
from smt_dist.errors import SMTError
from smt_dist.selection.steps import share_of_step

Batch = Mapping[str, Any]
LABELS = ("labels", "shift_labels")


def mask_repeated_rows(batch: Batch, state: GradientState) -> Batch:
    """Mask the labels of the rows that only fill up the last batch of a pass.

    Args:
        batch: this rank's, as the data loader that is being iterated over has just given it.
        state: accelerate's, which knows that data loader and whether this was its last batch.
    """
    labels = {name: batch[name] for name in LABELS if batch.get(name) is not None}
    if not labels or not state.end_of_dataloader:
        return batch
    rows = len(next(iter(labels.values())))
    repeated = torch.arange(rows - repeated_rows(state.active_dataloader, rows), rows)
    masked = {name: value.index_fill(0, repeated.to(value.device), IGNORED) for name, value in labels.items()}
    return {**batch, **masked}


def repeated_rows(loader: Any, rows: int) -> int:
    """Count the rows at the end of this rank's last batch that another batch has already had.

    Args:
        loader: as ``Accelerator.prepare`` makes it; rows are spread over the ranks in blocks of ``rows``.
        rows: of the batch; the same on all ranks.
    """
    if isinstance(loader, DataLoaderDispatcher):
        return rows - _own(loader.remainder, rows, get_rank())
    sampler = loader.batch_sampler
    while isinstance(sampler, SkipBatchSampler):  # a resumed epoch's: accelerate's own `remainder` is unknown there
        sampler = sampler.batch_sampler
    if not isinstance(sampler, BatchSamplerShard) or sampler.num_processes == 1 or sampler.drop_last:
        return 0  # nothing is filled up; BatchRebalanceSampler shares rows out by itself
    order = getattr(sampler.batch_sampler, "sampler", loader.dataset)
    remainder = len(order) % (rows * sampler.num_processes)
    return rows - _own(remainder, rows, sampler.process_index) if remainder else 0


def _own(remainder: int, rows: int, rank: int) -> int:
    return min(max(remainder - rank * rows, 0), rows)


def check_loader(loader: Any) -> Any:
    """Return ``loader`` if its ranks have equally many batches and know the repeated rows.

    Raises:
        SMTError: ``accelerator_config`` asks for something else.
    """
    if isinstance(loader.dataset, IterableDatasetShard):
        raise SMTError("--accelerator_config: dispatch_batches false can't be used with data of unknown length")
    if not getattr(loader.batch_sampler, "even_batches", True):
        raise SMTError("--accelerator_config: even_batches false would leave ranks waiting for one another")
    return loader


class TokenMean:
    """Compute the mean loss over the trained tokens of all batches on all ranks."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | float = 0.0
        self._tokens: torch.Tensor | int = 0

    def add(self, loss: torch.Tensor | None, tokens: torch.Tensor | None) -> None:
        """Add a batch's mean loss over ``tokens`` tokens, if it has a loss; NaN without tokens."""
        if loss is None:
            return
        tokens = tokens.to(loss.device)
        # fp64: the result must not depend on the order of the batches.
        self._sum += torch.where(tokens > 0, loss.double() * tokens, 0.0)
        self._tokens += tokens

    def value(self) -> float:
        """Compute the mean, NaN without any token; collective."""
        totals = torch.tensor([float(self._sum), float(self._tokens)], dtype=torch.float64)
        total, tokens = all_reduce_sum(totals.to(collective_device())).tolist()
        return total / tokens if tokens else math.nan


class StepTokens:
    """Weigh micro-batches by tokens, for models that take no ``num_items_in_batch``.

    Attributes:
        total: trained tokens of the global step.
    """

    def __init__(self) -> None:
        self.total = 0

    def begin(self, batches: list[Batch]) -> None:
        """Count a global step's tokens, from this rank's micro-batches; collective."""
        tokens = torch.tensor(sum(int(trained_tokens(batch)) for batch in batches), device=collective_device())
        self.total = int(all_reduce_sum(tokens))

    def share(self, loss: torch.Tensor, outputs: Any, batch: Batch, world_size: int) -> torch.Tensor:
        """Scale a micro-batch's mean loss to its share of the step, times the ranks averaged over."""
        return world_size * share_of_step(loss, outputs["logits"], int(trained_tokens(batch)), self.total)
