"""Plan the memory of a run before it is launched: no weights are read, no GPU is needed.

smt-plan plan --model_config config.json --smt_config S.json --engine fsdp2 --world_size 8
    --method smt --gradient_checkpointing --per_device_train_batch_size 1 --max_seq_length 2048
    --device_memory 80GiB --output plan.json
smt-plan plan ... --search batch      (or world_size, or blocks: what still fits)
smt-plan validate --output validation.json      (plans beside real runs of small models)
python launch/profile_memory.py ...      (the same program by its path in a checkout)
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from smt_dist.cli.benchmarks import run_benchmark
from smt_dist.cli.program import HelpFormatter, configure_logging, raise_usage_error, run_program
from smt_dist.errors import SMTError

if TYPE_CHECKING:  # imported where they are used: `--help` should not wait for torch
    from smt_dist.memory.plan.plan import Plan
    from smt_dist.memory.plan.request import Request

ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")


def parse_arguments() -> argparse.Namespace:
    """Read the command line. Raises SMTError, naming the flag."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    plan = commands.add_parser("plan", help="what a rank will need", formatter_class=HelpFormatter, allow_abbrev=False)
    _add_plan_flags(plan.add_argument)
    commands.add_parser("validate", help="plans beside real runs of small models; needs the benchmarks")
    parser.error = plan.error = raise_usage_error
    return parser.parse_args()


def _add_plan_flags(add: Any) -> None:
    add("--model_config", help="the model's config.json")
    add("--model_name_or_path", help="model folder or hub name, of which the config is read")
    add("--trust_remote_code", action="store_true", help="run code that comes with the model's config")
    add("--smt_config", help="SMT config, JSON; None: q, k, v, blocks of 256, 0.84 %% of the 2-D parameters")
    add("--engine", default="ddp", help=f"one of {', '.join(ENGINES)}")
    add("--world_size", type=int, default=1, help="ranks")
    add("--dp_replicate_size", type=int, default=1, help="fsdp2: replicas of the sharded base (HSDP)")
    add("--deepspeed", help="DeepSpeed JSON, for the sizes of ZeRO's buffers; None: DeepSpeed's defaults")
    add("--method", default="smt", help="smt, full (fp32 weights and AdamW), or lora (as many parameters as smt)")
    add("--gradient_checkpointing", action="store_true", help="recompute activations in the backward")
    add("--per_device_train_batch_size", type=int, default=1, help="rows a rank in a micro-batch")
    add("--gradient_accumulation_steps", type=int, default=1, help="micro-batches a step")
    add("--max_seq_length", type=int, default=1024, help="tokens a row")
    add("--dtype", default="bfloat16", help="bfloat16 or float32: of the base; for full: of the computation")
    add("--fsdp2_units", default="auto", help="smt with fsdp2: layer, weight or auto, as for train.py")
    add("--fsdp2_prefetch", type=yes_or_no, default=True, help="smt with fsdp2: yes or no, as for train.py")
    add("--loss_chunk_size", type=int, default=4096, help="smt: vocabulary entries whose logits exist at once; 0: all")
    add("--backend", default="nccl", help="of the collectives: nccl, or gloo, which copies what it gathers once more")
    add("--selection", help="chosen blocks, JSON; None: spread evenly, and the worst case beside it")
    add("--gpus_per_node", type=int, default=8, help="ranks that share a node's host memory")
    add("--device_memory", help="such as 80GiB (2^30 bytes each) or 40GB (10^9)")
    add("--exact", action="store_true", help="trace every layer instead of two small depths")
    add("--search", help="batch, world_size or blocks: the largest micro-batch, smallest world or largest budget")
    add("--output", type=Path, help="JSON file to write; sizes in bytes")


def yes_or_no(text: str) -> bool:
    """Parse ``yes``, ``true`` or ``1``, and their opposites.

    Raises ValueError.
    """
    if text.lower() not in ("yes", "true", "1", "no", "false", "0"):
        raise ValueError(text)
    return text.lower() in ("yes", "true", "1")


def make_request(arguments: argparse.Namespace) -> Request:
    """Make the request that the flags describe.

    Raises SMTError for what is wrong with them.
    """
    from smt_dist.checkpoint.adapter import config_of
    from smt_dist.config import SMTConfig
    from smt_dist.memory.plan.categories import parse_size
    from smt_dist.memory.plan.request import Request, read_model_config
    from smt_dist.sparse.blocks import BlockSelection

    if (arguments.model_config is None) == (arguments.model_name_or_path is None):
        raise SMTError("give --model_config or --model_name_or_path, one of them")
    flag = "--model_config" if arguments.model_config is not None else "--model_name_or_path"
    selection = BlockSelection.from_json_file(arguments.selection) if arguments.selection else None
    path = arguments.model_config if arguments.model_config is not None else arguments.model_name_or_path
    return Request(
        model=read_model_config(path, flag, arguments.trust_remote_code),
        smt=SMTConfig.from_flag(arguments.smt_config) if arguments.smt_config is not None else config_of(selection),
        engine=arguments.engine,
        world_size=arguments.world_size,
        replicas=arguments.dp_replicate_size,
        method=arguments.method,
        checkpointing=arguments.gradient_checkpointing,
        batch=arguments.per_device_train_batch_size,
        accumulation=arguments.gradient_accumulation_steps,
        sequence=arguments.max_seq_length,
        dtype=arguments.dtype,
        selection=selection,
        ranks_per_node=arguments.gpus_per_node,
        device_memory=parse_size(arguments.device_memory) if arguments.device_memory else None,
        units=arguments.fsdp2_units,
        prefetch=arguments.fsdp2_prefetch,
        loss_chunk=arguments.loss_chunk_size,
        zero=_read_zero(arguments.deepspeed, arguments.engine),
        backend=arguments.backend,
    )


def _read_zero(path: str | None, engine: str) -> dict[str, Any]:
    from smt_dist.files import parse_json_object, read_text

    if path is None:
        return {}
    if not engine.startswith("zero"):
        raise SMTError(f"--deepspeed belongs to --engine zero1, zero2 or zero3, not to {engine}")
    section = parse_json_object(read_text(path), f"--deepspeed: {path}").get("zero_optimization", {})
    if not isinstance(section, dict):
        raise SMTError(f"--deepspeed: {path}: zero_optimization is no object")
    if str(section.get("stage", engine[-1])) != engine[-1]:
        raise SMTError(f"--deepspeed: {path} is of stage {section['stage']}, --engine is {engine}")
    return section


def run_plan(arguments: argparse.Namespace) -> None:
    """Make one plan, or search."""
    from smt_dist.cli.program import check_writable
    from smt_dist.memory.plan.plan import make_plan
    from smt_dist.memory.plan.search import search

    request = make_request(arguments)
    if arguments.output is not None:
        check_writable("--output", arguments.output.absolute().parent)
    with tqdm(desc="planning", unit=" part", bar_format="{desc}: {n_fmt} parts, {elapsed}, now {postfix}") as bar:

        def on_progress(what: str) -> None:
            bar.set_postfix_str(what)
            bar.update()

        if arguments.search is None:
            plan = make_plan(request, arguments.exact, on_progress)
            text, content = plan_table(plan), plan.to_json()
        else:
            found = search(request, arguments.search, arguments.exact, on_progress)
            text = search_table(found)
            plans = {str(value): plan.to_json() for value, plan in found.plans.items()}
            content = {"search": found.what, "found": found.value, "plans": plans}
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(content, indent=2) + "\n")


def plan_table(plan: Plan) -> str:
    """Format a plan as a table with a row per category and a column per phase."""
    from smt_dist.memory.plan.categories import CATEGORIES, format_size

    columns = dict(plan.phases) | ({"training, worst": plan.worst} if plan.worst else {})
    rows = [["", *columns]]
    for name in (*CATEGORIES, "total"):
        sizes = [phase.peak.to_json()[name] for phase in columns.values()]
        if any(sizes):
            rows.append([name.replace("_", " "), *(format_size(size) if size else "-" for size in sizes)])
    rows.append(["peak is at", *(phase.moment for phase in columns.values())])
    width = [max(len(row[index]) for row in rows) for index in range(len(rows[0]))]
    lines = [_aligned(row, width) for row in rows]
    rank = f", rank {plan.lora_rank}" if plan.lora_rank else ""
    request = plan.request
    head = (
        f"{request.model.model_type}, {plan.parameters:,} parameters, {request.method}{rank}: {plan.trained:,} "
        f"trained; {request.engine}, {request.world_size} ranks; a rank's peaks:"
    )
    ends = [f"host memory a node while loading: {format_size(plan.host_bytes)}"]
    if plan.fits is not None:
        verdict = "fits into" if plan.fits else "does NOT fit into"
        ends.append(f"{format_size(plan.peak_bytes)} {verdict} {format_size(request.device_memory or 0)}")
    return "\n".join([head, *lines, *ends])


def _aligned(cells: list[str], width: list[int]) -> str:
    others = [cell.rjust(size) for cell, size in zip(cells[1:], width[1:], strict=True)]
    return "  ".join([cells[0].ljust(width[0]), *others])


def search_table(found: Any) -> str:
    """Format a search as a table with a row per value that was planned."""
    from smt_dist.memory.plan.categories import format_size

    lines = [
        f"{found.what} {value:>8}  {format_size(plan.peak_bytes):>12}  {'fits' if plan.fits else 'does not fit'}"
        for value, plan in found.plans.items()
    ]
    best = "nothing fits" if found.value is None else f"found: {found.what} {found.value}"
    return "\n".join([*lines, best])


def main() -> None:
    """Run one subcommand."""
    if sys.argv[1:2] == ["validate"]:  # its flags are the benchmark's own
        run_benchmark("validate_memory", sys.argv[2:])
        return
    arguments = parse_arguments()
    configure_logging()
    run_plan(arguments)


if __name__ == "__main__":
    run_program(main)
