"""Run a warm-up's global steps: micro-batches, label tokens, losses and the model's state."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from tqdm.auto import tqdm

from smt_dist.data.dataset import trained_tokens
from smt_dist.distributed import all_reduce_sum, collective_device, get_rank, is_distributed
from smt_dist.engines.base import Tuning
from smt_dist.errors import SMTError
from smt_dist.selection.scores import ScoreAccumulator

Batch = Mapping[str, torch.Tensor]
GlobalStep = list[Batch]
# Called with the accumulator (None if there is none) and the number of steps done, before the first step and after
# each one, in every pass.
Observer = Callable[[ScoreAccumulator | None, int], None]


def run_steps(
    model: nn.Module,
    tuning: Tuning,
    batches: Iterable[Batch | list[Batch]],
    steps: int,
    accumulator: ScoreAccumulator,
    progress: str | None,
    observe: Observer | None = None,
) -> int:
    """Run up to ``steps`` global steps of forwards and backwards.

    Args:
        model: the bare model, with the accumulator's hooks.
        tuning: the functions for a forward, a backward and the end of a micro-batch.
        batches: as for :func:`collect_scores`.
        steps: the most global steps to run.
        accumulator: its ``end_micro_batch`` and ``end_step`` are called.
        progress: the progress bar's label; None for no bar.
        observe: called before the first step and after each one.

    Returns:
        The number of steps run.

    Raises:
        SMTError: a gradient isn't finite (names the module), or :func:`next_step` refuses a batch.
    """
    iterator = iter(batches)
    names = list(dict(model.named_modules()))
    bar = tqdm(total=steps, desc=progress, unit="step", disable=progress is None or get_rank() != 0)
    done = 0
    if observe is not None:
        observe(accumulator, done)
    with bar:
        while done < steps and (step := next_step(iterator, done)) is not None:
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


def next_step(iterator: Iterator[Batch | list[Batch]], index: int) -> tuple[GlobalStep, int] | None:
    """Return this rank's micro-batches of the next global step, and all ranks' label tokens.

    Returns:
        The micro-batches and the number of tokens; None after the last step. Collective.

    Raises:
        SMTError: there is no batch at all, a batch has no labels, a step has no unmasked label, or the ranks have
            different numbers of micro-batches.
    """
    item = next(iterator, None)
    micro_batches = [] if item is None else list(item) if isinstance(item, list) else [item]
    unlabelled = sum("labels" not in batch for batch in micro_batches)
    tokens = 0 if unlabelled else sum(int(trained_tokens(batch)) for batch in micro_batches)
    count = len(micro_batches)
    # Counts are equal on all ranks if sum(n)^2 == W * sum(n^2). Unequal counts would make the other ranks hang.
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


def _loss(model: nn.Module, tuning: Tuning, batch: Batch, tokens: int) -> torch.Tensor:
    """Return the batch's sum of token losses divided by the global step's label tokens."""
    device = device_of(model)
    inputs = {name: value.to(device) for name, value in batch.items()}
    if _takes_token_count(model):
        return tuning.forward(**inputs, num_items_in_batch=tokens).loss
    outputs = tuning.forward(**inputs)
    return share_of_step(outputs.loss, outputs.logits, int(trained_tokens(batch)), tokens)


def share_of_step(loss: torch.Tensor, logits: torch.Tensor, own: int, tokens: int) -> torch.Tensor:
    """Scale a mean loss over ``own`` tokens to its share of the mean over a step's ``tokens``."""
    # The mean over no token is NaN. Such a batch adds zero, and still runs for the other ranks' collectives.
    return loss * (own / tokens) if own else logits.sum() * 0


def _takes_token_count(model: nn.Module) -> bool:
    # The same check as in transformers.Trainer.
    if hasattr(model, "accepts_loss_kwargs"):
        return bool(model.accepts_loss_kwargs)
    parameters = inspect.signature(model.forward).parameters
    return "num_items_in_batch" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _refuse_non_finite(accumulator: ScoreAccumulator, names: list[str], step: int) -> None:
    problem = f"warm-up step {step + 1}: the gradient of {{}} is not finite (NaN or infinity)"
    refuse_module(accumulator.non_finite_module(), names, problem)


def refuse_module(found: str | None, names: list[str], problem: str) -> None:
    """Raise SMTError on all ranks if any rank found a wrong module; collective.

    Args:
        found: the module that this rank found, if any.
        names: of all modules, in the model's order.
        problem: the message, with ``{}`` for the module's name.

    Raises:
        SMTError: a rank found one; of several, the last in the model's order is named.
    """
    bad = -1 if found is None else names.index(found)
    if is_distributed():
        found = torch.tensor([bad], device=collective_device())
        torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
        bad = int(found.item())
    if bad >= 0:
        raise SMTError(problem.format(names[bad]))


@contextmanager
def frozen(model: nn.Module, training: bool = True) -> Iterator[None]:
    """Freeze all parameters inside the context, and restore the model's state after it.

    Args:
        model: its key-value cache is off inside the context.
        training: the model's mode inside the context; gradient checkpointing works in training mode only.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    was_training = model.training
    config = getattr(model, "config", None)
    used_cache = getattr(config, "use_cache", None)
    for parameter in trainable:
        parameter.requires_grad_(False)
    if used_cache is not None:
        config.use_cache = False
    model.train(training)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
        if used_cache is not None:
            config.use_cache = used_cache
        model.train(was_training)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch inside the context, for equal dropout masks in every pass.

    The caller's random state is restored after it.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter."""
    return next(model.parameters()).device
