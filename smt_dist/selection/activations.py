"""Compute statistics of the layers' inputs from forward passes only, without a backward."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from smt_dist.distributed import all_reduce_sum, get_rank
from smt_dist.errors import SMTError
from smt_dist.selection.steps import Batch, Observer, device_of, frozen, next_step, refuse_module
from smt_dist.sparse.blocks import BlockGrid
from smt_dist.sparse.sharded import reshard
from smt_dist.sparse.targets import is_embedding

IGNORED = -100


def collect_input_rms(
    model: nn.Module,
    modules: Iterable[str],
    batches: Iterable[Batch | list[Batch]],
    steps: int,
    progress: bool = False,
    observe: Observer | None = None,
) -> tuple[dict[str, torch.Tensor], int]:
    """Return the root mean square of each module's input columns over all ranks' real tokens.

    Padding is left out, because its amount depends on how rows are distributed to ranks. Dropout is off.

    Args:
        model: as for :func:`smt_dist.collect_scores`.
        modules: their names.
        batches: as for :func:`smt_dist.collect_scores`.
        steps: the most global steps to run.
        progress: show a progress bar on rank 0.
        observe: called before the first step and after each one, with None as the accumulator.

    Returns:
        Module -> fp64 ``[in]`` on the CPU, equal on all ranks, zeros for a module that no token reached; and the
        number of steps run.

    Raises:
        SMTError: a module is an embedding, whose inputs are ids; a module gets tokens in another order than the
            batch's (routed experts) while there is padding; an input isn't finite; or a batch that
            :func:`smt_dist.collect_scores` refuses too.
    """
    modules = list(modules)
    lookups = [name for name in modules if is_embedding(model.get_submodule(name))]
    if lookups:
        raise SMTError(
            f"smt config selection.score: the input of {lookups[0]} are token ids, which have no columns to score; "
            "take it out of target_modules, or use another score"
        )
    sums = _InputSums(model, modules)
    iterator, done, names = iter(batches), 0, list(dict(model.named_modules()))
    bar = tqdm(total=steps, desc="warm-up (forwards)", unit="step", disable=not progress or get_rank() != 0)
    if observe is not None:
        observe(None, done)
    with bar, frozen(model, training=False), torch.no_grad(), sums.watching():
        while done < steps and (step := next_step(iterator, done)) is not None:
            for batch in step[0]:
                sums.real_tokens = real_tokens(batch).to(sums.device)
                model(**{name: value.to(sums.device) for name, value in batch.items()})
            reason = "gets tokens in another order than the batch, so padding can't be left out; use a gradient score"
            refuse_module(sums.unmatched, names, f"warm-up step {done + 1}: {{}} {reason}")
            done += 1
            bar.update()
            if observe is not None:
                observe(None, done)
        reshard(model)
    return sums.root_mean_squares(), done


def block_rms(columns: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    """Return the ``activation`` score: the root mean square of each block's input columns.

    Args:
        columns: root mean squares ``[in]`` of the input columns.
        grid: of the weight ``[out, in]``; column j of the input meets column j of the weight.

    Returns:
        Scores ``[block rows, block columns]``, equal within a block column.
    """
    by_column = columns.square().reshape(grid.shape[1], grid.block_cols).mean(-1).sqrt()
    return by_column.expand(grid.shape).contiguous()


def real_tokens(batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return a boolean mask ``[batch, length]`` that is False at padding.

    Packed rows have no attention mask; their padding is one more segment at the end, the only one without a label.
    """
    if "attention_mask" in batch:
        return batch["attention_mask"].bool()
    if "position_ids" not in batch:
        return torch.ones_like(batch["labels"], dtype=torch.bool)
    segments = (batch["position_ids"] == 0).cumsum(-1)
    labelled = torch.zeros(len(segments), int(segments.max()) + 1, dtype=torch.int64)
    labelled.scatter_add_(1, segments, (batch["labels"] != IGNORED).long())
    return labelled.gather(1, segments) > 0


class _InputSums:
    """Hold the sums of squares of each module's input columns, as views of one flat fp64 tensor.

    Attributes:
        real_tokens: mask of the current batch, ``[batch, length]``.
        unmatched: the first module whose tokens couldn't be matched with this mask.
    """

    def __init__(self, model: nn.Module, modules: list[str]) -> None:
        self.device = device_of(model)
        self.real_tokens = torch.empty(0, 0, dtype=torch.bool)
        self.unmatched: str | None = None
        self._modules = {name: model.get_submodule(name) for name in modules}
        widths = [int(module.in_features) for module in self._modules.values()]
        self._flat = torch.zeros(sum(widths) + len(widths), dtype=torch.float64, device=self.device)
        *sums, self._tokens = self._flat.split([*widths, len(widths)])
        self._sums = dict(zip(modules, sums, strict=True))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Add every forward of the modules inside the context to the sums."""

        def hook_for(index: int, name: str) -> Any:
            return lambda _module, args: self._count(index, name, args[0].detach())

        handles = [
            module.register_forward_pre_hook(hook_for(index, name))
            for index, (name, module) in enumerate(self._modules.items())
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def root_mean_squares(self) -> dict[str, torch.Tensor]:
        """Return module -> root mean squares ``[in]`` over all ranks; collective.

        Raises:
            SMTError: an input wasn't finite.
        """
        all_reduce_sum(self._flat)
        result = {}
        for (name, sums), tokens in zip(self._sums.items(), self._tokens.tolist(), strict=True):
            if not sums.isfinite().all():
                raise SMTError(f"warm-up: the input of {name} is not finite (NaN or infinity)")
            result[name] = (sums / max(tokens, 1)).sqrt().cpu()
        return result

    def _count(self, index: int, name: str, x: torch.Tensor) -> None:
        tokens = x.reshape(-1, x.shape[-1])
        if len(tokens) == self.real_tokens.numel():
            tokens = tokens[self.real_tokens.flatten()]
        elif not self.real_tokens.all() and self.unmatched is None:
            self.unmatched = name
        self._sums[name].add_(torch.linalg.vector_norm(tokens, dim=0, dtype=torch.float64).square())
        self._tokens[index] += len(tokens)
