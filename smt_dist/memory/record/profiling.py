"""Prepare and write the results of ``smt-train --profile_memory``."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedModel

from smt_dist.config import SMTConfig
from smt_dist.distributed import get_rank, get_world_size, is_distributed, raise_on_any_rank
from smt_dist.errors import SMTError, first_line
from smt_dist.memory.plan.plan import make_plan
from smt_dist.memory.plan.request import Request
from smt_dist.memory.record.plots import require_matplotlib
from smt_dist.memory.record.recorder import Recorder
from smt_dist.memory.record.report import table, write_report
from smt_dist.training.arguments import SMTTrainingArguments

FLAG = "--profile_memory"


def prepare_profiling(folder: Path) -> None:
    """Check that matplotlib is there and make the folder. Raises SMTError, naming the flag."""
    require_matplotlib(FLAG)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SMTError(f"{FLAG}: {folder}: can't be made ({error.strerror or error})") from None
    if not os.access(folder, os.W_OK):
        raise SMTError(f"{FLAG}: {folder} is not writable")


def publish(
    recorder: Recorder, folder: Path, model: PreTrainedModel, config: SMTConfig, args: SMTTrainingArguments
) -> str | None:
    """Gather recordings, plan, and write everything on rank 0; collective.

    Returns the table on rank 0, None elsewhere.
    """
    ranks: list[Any] = [recorder.recording.to_json()]
    if is_distributed():
        ranks *= get_world_size()
        dist.all_gather_object(ranks, recorder.recording.to_json())

    def write() -> str | None:
        if get_rank() != 0:
            return None
        report = _report(ranks, model, config, args)
        try:
            write_report(folder, report)
        except OSError as error:
            raise SMTError(f"{FLAG}: {folder}: can't be written ({error.strerror or error})") from None
        return table(report)

    return raise_on_any_rank(write, "the memory report")


def requests_of_run(
    ranks: list[dict[str, Any]], model: PreTrainedModel, config: SMTConfig, args: SMTTrainingArguments
) -> dict[str, Request]:
    """Return phase -> the request of what was run.

    With the largest micro-batch that any rank recorded in it.
    """
    section = (args.filled_deepspeed_config() or {}).get("zero_optimization", {})

    def request(phase: str) -> Request:
        rows, tokens = largest_batch(ranks, phase)
        return Request(
            model=model.config,
            smt=config,
            engine=f"zero{section['stage']}" if args.deepspeed else args.engine,
            world_size=get_world_size(),
            replicas=args.dp_replicate_size,
            checkpointing=bool(args.activation_checkpointing),
            batch=rows,
            sequence=tokens,
            dtype=args.dtype,
            selection=model.smt.selection if phase == "training" else None,
            ranks_per_node=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            zero=section,
            units=args.fsdp2_units,
            prefetch=args.fsdp2_prefetch,
            loss_chunk=args.loss_chunk_size,
            accumulation=args.gradient_accumulation_steps,
            backend="gloo" if ranks[0]["device"] == "cpu" else "nccl",
        )

    return {phase: request(phase) for phase in ("warmup", "training") if largest_batch(ranks, phase) != (0, 0)}


def largest_batch(ranks: list[dict[str, Any]], phase: str) -> tuple[int, int]:
    """Return (rows, tokens per row) of a phase's largest micro-batch; zeros if it had none.

    Over all ranks.
    """
    batches = [tuple(rank["batches"][phase].values()) for rank in ranks if phase in rank["batches"]]
    return max(batches, key=math.prod, default=(0, 0))


def plan_in_new_process(requests: dict[str, Request]) -> dict[str, Any]:
    """Return phase -> moment and peak, planned in a new process.

    It has no process group and none of DeepSpeed's changes to torch.

    Args:
        requests: :func:`requests_of_run`.

    Raises:
        SMTError: the run can't be planned.
    """
    try:
        with _without_accelerate(), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            plans = dict(zip(requests, pool.map(_plan, requests.values()), strict=True))
    except (pickle.PicklingError, AttributeError, BrokenProcessPool) as error:
        raise SMTError(f"the plan's process failed ({first_line(error)})") from None
    wanted = {phase: plan[phase] for phase, plan in plans.items() if phase in plan}
    return {"load": next(iter(plans.values()))["load"], **wanted} if plans else {}


def _plan(request: Request) -> dict[str, Any]:
    return {name: phase.to_json() for name, phase in make_plan(request).phases.items()}


@contextmanager
def _without_accelerate() -> Iterator[None]:
    """Remove accelerate's variables inside the context: the new process is no rank."""
    names = [name for name in os.environ if name.startswith("ACCELERATE_")]
    taken = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ |= taken


def _report(
    ranks: list[dict[str, Any]], model: PreTrainedModel, config: SMTConfig, args: SMTTrainingArguments
) -> dict[str, Any]:
    planned, no_plan = {}, None
    try:
        planned = plan_in_new_process(requests_of_run(ranks, model, config, args))
    except SMTError as error:
        no_plan = str(error)
    rows, tokens = largest_batch(ranks, "training")
    run = {
        "model": model.config.model_type,
        "engine": args.engine,
        "ranks": get_world_size(),
        "dtype": args.dtype,
        "gradient checkpointing": bool(args.activation_checkpointing),
        "largest micro-batch recorded": f"{rows} x {tokens} tokens",
        "blocks": sum(map(len, model.smt.selection.blocks.values())),
    }
    return {"run": run, "planned": planned, "no_plan": no_plan, "ranks": ranks}
