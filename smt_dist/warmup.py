"""The warm-up: run batches, feed the score accumulator, aggregate over ranks -> ``BlockScores``.

In ``probe`` mode no weight moves, no weight gets a ``.grad`` and no optimizer exists. The targets' outputs pass
through a small autograd function that hands (input, output gradient) to the accumulator, so a probe works
on any base that can compute gradients of its activations: plain, partitioned by ZeRO-3 or sharded by FSDP2.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from smt_dist.blocks import BlockGrid, resolve_block_size
from smt_dist.config import SMTConfig
from smt_dist.distributed import all_reduce_sum, collective_device, get_rank, is_distributed
from smt_dist.engines import Tuning
from smt_dist.errors import SMTError
from smt_dist.scores import BlockScores, ScoreAccumulator, layer_key, make_accumulator
from smt_dist.targets import count_parameters_2d, find_targets, weight_shape

logger = logging.getLogger(__name__)

Batch = Mapping[str, torch.Tensor]
GlobalStep = list[Batch]
# Told the accumulator and the steps done so far, before the first step and after each; once more for every pass.
Observer = Callable[[ScoreAccumulator, int], None]


def collect_scores(
    model: nn.Module,
    batches: Iterable[Batch | list[Batch]],
    config: SMTConfig,
    progress: bool = False,
    observe: Observer | None = None,
) -> BlockScores:
    """Score every block of the target weights by its gradient over up to ``config.warmup.steps`` global steps.

    ``g_t`` is the gradient of (sum of token losses over all ranks and micro-batches of global step t) / (number
    of unmasked label tokens of that step), so unequal prompt masks weigh as they do in training.

    Args:
        model: a causal language model on its device; under ZeRO-3 with the engine's hooks
            (:meth:`smt_dist.engines.Engine.probing`). Left as it was.
        batches: this rank's keyword micro-batches, one a global step, or a list of them for one global step.
            All ranks need as many.
        config: its score, targets, steps and passes. More than one pass reads ``batches`` into a list.
        progress: show a progress bar on rank 0.
        observe: looks on from the beginning.

    Returns:
        Scores of all targets, equal on all ranks.

    Raises:
        SMTError: no batch, batches that differ in number between ranks, a step without labels, a non-finite
            gradient (names the module), or what :func:`find_targets` refuses.
    """
    groups, grids = plan_grids(model, config)
    parts = _split_layers(grids, config.warmup.passes)
    if len(parts) > 1:
        batches = list(batches)
    tables: dict[str, torch.Tensor] = {}
    steps = 0
    for index, part in enumerate(parts):
        accumulator = make_accumulator(config.selection.score, part, _device_of(model))
        with _frozen(model), probe_modules(model, accumulator, part), _seeded(config.selection.seed):
            label = "warm-up" if len(parts) == 1 else f"warm-up, pass {index + 1} of {len(parts)}"
            probing = Tuning(model, torch.Tensor.backward, lambda: None)
            label = label if progress else None
            steps = run_steps(model, probing, batches, config.warmup.steps, accumulator, label, observe)
        tables.update(accumulator.tables())
    if steps < config.warmup.steps:
        logger.warning("the warm-up saw %d global steps of the %d that the config asks for", steps, config.warmup.steps)
    return build_scores(model, config, groups, grids, tables, steps)


def plan_grids(model: nn.Module, config: SMTConfig) -> tuple[dict[str, list[str]], dict[str, BlockGrid]]:
    """Group name -> target modules, and module -> grid in the model's order. Raises SMTError as its parts do."""
    groups = find_targets(model, config)
    targets = {name for names in groups.values() for name in names}
    shapes = {name: weight_shape(module) for name, module in model.named_modules() if name in targets}
    block_size = resolve_block_size(config.block_size, shapes)
    return groups, {name: BlockGrid(*shape, *block_size) for name, shape in shapes.items()}


def build_scores(
    model: nn.Module,
    config: SMTConfig,
    groups: dict[str, list[str]],
    grids: dict[str, BlockGrid],
    tables: Mapping[str, torch.Tensor],
    steps: int,
) -> BlockScores:
    """Put what the accumulators found into one value on the CPU."""
    first = next(iter(grids.values()))
    return BlockScores(
        block_size=(first.block_rows, first.block_cols),
        tables={name: tables[name].cpu() for name in grids},
        shapes={name: (grid.rows, grid.cols) for name, grid in grids.items()},
        groups=groups,
        parameters_2d=count_parameters_2d(model),
        score=config.selection.score,
        steps=steps,
    )


@contextmanager
def probe_modules(model: nn.Module, accumulator: ScoreAccumulator, modules: Iterable[str]) -> Iterator[None]:
    """Feed ``accumulator`` from each forward and backward of ``modules`` inside the context."""
    # Makes every probed output require a gradient, so that frozen layers below the lowest target cost nothing
    # and no hook on the embedding is needed.
    anchor = torch.zeros((), requires_grad=True)

    def hook_for(name: str):
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            if not torch.is_grad_enabled():
                return None
            return _Probe.apply(output, args[0], anchor, accumulator, name)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(hook_for(name)) for name in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Probe(torch.autograd.Function):
    """Identity on a target's output; its backward shows the output gradient to the accumulator."""

    @staticmethod
    def forward(
        ctx: Any,
        y: torch.Tensor,
        x: torch.Tensor,
        anchor: torch.Tensor,  # noqa: ARG004 (makes the output require a gradient)
        accumulator: ScoreAccumulator,
        name: str,
    ) -> torch.Tensor:
        ctx.accumulator, ctx.name = accumulator, name
        # Saved by autograd, not in a closure, so that gradient checkpointing can drop and recompute it.
        ctx.save_for_backward(accumulator.keep(name, x.reshape(-1, x.shape[-1])))
        # A copy: model code may write into a target's output, which autograd forbids on a view from here.
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (kept,) = ctx.saved_tensors
        ctx.accumulator.add(ctx.name, grad_y.reshape(-1, grad_y.shape[-1]), kept)
        return grad_y, None, None, None, None


def run_steps(
    model: nn.Module,
    tuning: Tuning,
    batches: Iterable[Batch | list[Batch]],
    steps: int,
    accumulator: ScoreAccumulator,
    progress: str | None,
    observe: Observer | None = None,
) -> int:
    """Run up to ``steps`` global steps of forwards and backwards; returns how many there were.

    Args:
        model: the bare model, with the accumulator's hooks.
        tuning: how a forward, a backward and the end of a micro-batch go.
        batches: as for :func:`collect_scores`.
        steps: the most to run.
        accumulator: is told where micro-batches and steps end.
        progress: the bar's label; None for no bar.
        observe: looks on from the beginning.
    """
    iterator = iter(batches)
    names = list(dict(model.named_modules()))
    bar = tqdm(total=steps, desc=progress, unit="step", disable=progress is None or get_rank() != 0)
    done = 0
    if observe is not None:
        observe(accumulator, done)
    with bar:
        while done < steps and (step := _next_step(iterator, done)) is not None:
            micro_batches, tokens = step
            for batch in micro_batches:
                tuning.backward(_loss(model, tuning, batch, tokens))
                accumulator.end_micro_batch()
                tuning.step()
            accumulator.end_step()
            _refuse_non_finite(accumulator, names, done)
            done += 1
            bar.update()
            if observe is not None:
                observe(accumulator, done)
    return done


def _next_step(iterator: Iterator[Batch | list[Batch]], index: int) -> tuple[GlobalStep, int] | None:
    """This rank's micro-batches of the next global step and all ranks' label tokens; None at the common end."""
    item = next(iterator, None)
    micro_batches = [] if item is None else list(item) if isinstance(item, list) else [item]
    unlabelled = sum("labels" not in batch for batch in micro_batches)
    tokens = 0 if unlabelled else sum(count_label_tokens(batch) for batch in micro_batches)
    count = len(micro_batches)
    # Equal counts on all ranks: sum(n)^2 == W * sum(n^2). Checked, for a rank that runs out makes the others hang.
    totals = torch.tensor([tokens, count, count * count, 1, unlabelled], dtype=torch.float64)
    tokens, counts, squares, ranks, unlabelled = all_reduce_sum(totals.to(collective_device())).tolist()
    if unlabelled:
        raise SMTError(f"warm-up step {index + 1}: a batch has no 'labels'")
    if counts**2 != ranks * squares:
        raise SMTError(f"warm-up step {index + 1}: the ranks have different numbers of micro-batches")
    if counts == 0:
        if index == 0:
            raise SMTError("warm-up: there is no batch")
        return None
    if tokens == 0:
        raise SMTError(f"warm-up step {index + 1}: every label of the global batch is masked (-100)")
    return micro_batches, int(tokens)


def count_label_tokens(batch: Batch) -> int:
    """The number of predicted tokens: a causal model predicts the labels from the second on."""
    return int((batch["labels"][..., 1:] != -100).sum())


def _loss(model: nn.Module, tuning: Tuning, batch: Batch, tokens: int) -> torch.Tensor:
    """The batch's sum of token losses over the global step's number of label tokens."""
    device = _device_of(model)
    inputs = {name: value.to(device) for name, value in batch.items()}
    if _takes_token_count(model):
        return tuning.forward(**inputs, num_items_in_batch=tokens).loss
    outputs, own = tuning.forward(**inputs), count_label_tokens(batch)
    # The mean over no token is NaN: such a batch still runs, for the other ranks' collectives, and adds zero.
    return outputs.loss * (own / tokens) if own else outputs.logits.sum() * 0


def _takes_token_count(model: nn.Module) -> bool:
    # The same question, asked the same way, as transformers.Trainer asks.
    if hasattr(model, "accepts_loss_kwargs"):
        return bool(model.accepts_loss_kwargs)
    parameters = inspect.signature(model.forward).parameters
    return "num_items_in_batch" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _refuse_non_finite(accumulator: ScoreAccumulator, names: list[str], step: int) -> None:
    own = accumulator.non_finite_module()
    bad = -1 if own is None else names.index(own)
    if is_distributed():
        found = torch.tensor([bad], device=collective_device())
        torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
        bad = int(found.item())
    if bad >= 0:
        raise SMTError(f"warm-up step {step + 1}: the gradient of {names[bad]} is not finite (NaN or infinity)")


def _split_layers(grids: dict[str, BlockGrid], passes: int) -> list[dict[str, BlockGrid]]:
    """Cut the targets into at most ``passes`` runs of whole layers."""
    layers = list(dict.fromkeys(layer_key(name) for name in grids))
    size = -(-len(layers) // passes)
    runs = [set(layers[start : start + size]) for start in range(0, len(layers), size)]
    return [{name: grid for name, grid in grids.items() if layer_key(name) in run} for run in runs]


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient inside; training mode, for gradient checkpointing; all restored after."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_training = model.training
    config = getattr(model, "config", None)
    used_cache = getattr(config, "use_cache", None)
    for parameter in trainable:
        parameter.requires_grad_(False)
    if used_cache is not None:
        config.use_cache = False
    model.train()
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        if used_cache is not None:
            config.use_cache = used_cache
        model.train(was_training)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Every pass sees the same dropout masks; the caller's random state is left alone."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def _device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
