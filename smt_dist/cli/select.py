"""Choose the blocks only, for `smt-train --selection`; or ask how stable the choice is.

smt-select --smt_config S.json --model_name_or_path M --train_file T.json --output selection.json
    [any transformers.TrainingArguments flag, such as --per_device_train_batch_size]
smt-select recipe.yaml [--flag value ...]                   (a recipe holds flags, as `flag: value`; later ones win)
torchrun --nproc_per_node N -m smt_dist.cli.select ...      (the same flags)
deepspeed --num_gpus N launch/select_blocks.py ...          (the same program by its path in a checkout)
smt-select ... --output stability.json
    --stability seeds=0,1,2 steps=25,50,100 halves files=a.json,b.json block_sizes=64,192
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from transformers import set_seed

from smt_dist.cli.program import check_writable, parse_arguments, run_program
from smt_dist.cli.selection_report import report_selection
from smt_dist.cli.stability_runs import Cell, compare, parse_axes, plan_cells, run_cells, table
from smt_dist.config import SMTConfig
from smt_dist.distributed import get_rank, raise_on_any_rank, write_on_rank_zero
from smt_dist.engines import make_engine
from smt_dist.errors import SMTError
from smt_dist.fault_tolerance.activity import begin_activity
from smt_dist.fault_tolerance.supervision import honour_collective_timeout, supervise
from smt_dist.files import replace_file
from smt_dist.models.cpu_products import fp32_products
from smt_dist.selection.block_scores import BlockScores, save_scores, scores_path
from smt_dist.sparse.blocks import BlockSelection
from smt_dist.training.arguments import SMTTrainingArguments
from smt_dist.training.loading import load_tokenizer_and_model
from smt_dist.training.pipeline import collect_and_select, load_data
from smt_dist.training.run_arguments import RunArguments
from smt_dist.training.run_plan import RunPlan


@dataclass
class SelectArguments(RunArguments):
    """Hold what to select on, and where to write the selection."""

    output: str = field(
        default="selection.json", metadata={"help": "the selection file to write; with --stability, the figures"}
    )
    stability: list[str] | None = field(
        default=None,
        metadata={
            "help": "compare selections along axes: seeds, steps, halves (with default values), files=A,B, "
            "block_sizes=A,B; an interrupted comparison goes on where it was"
        },
    )


def main() -> None:
    run, args = parse_arguments(SelectArguments, __doc__)
    run.check()
    if run.selection is not None or run.adapter is not None:
        raise SMTError("--selection and --adapter belong to train.py: this program makes the selection")
    if run.eval_file:
        raise SMTError("--eval_file: this program evaluates nothing")
    if run.profile_memory:
        raise SMTError("--profile_memory belongs to train.py")
    with fp32_products(args.cpu_fp32_products, "cpu" if args.use_cpu else "cuda", args.base_dtype):
        make_selection(run, args)


def make_selection(run: SelectArguments, args: SMTTrainingArguments) -> None:
    """Run the warm-up and write what it chose, or compare selections; collective."""
    args.set_up_process_group()
    supervise(args.heartbeat_timeout)
    set_seed(args.seed)
    output = Path(run.output)
    raise_on_any_rank(lambda: check_writable("--output", output.parent), "the output folder")
    config = RunPlan.resolve(run).config
    if config.warmup.mode == "full_ft":
        raise SMTError("warmup.mode full_ft moves the base, which this program doesn't keep: run train.py")
    cells = plan_stability(run, config, args)
    files = [cell.train_file for cell in cells] or [run.train_file]
    if config.selection.needs_batches and not all(files):
        run.check_data()
    begin_activity("load")
    engine = make_engine(args.engine_options)
    tokenizer, model = load_tokenizer_and_model(run, args, engine)
    honour_collective_timeout(model, args.ddp_timeout)
    if cells:
        paths = run_cells(cells, output.with_name(f"{output.stem}_cells"), run, args, tokenizer, model, engine)
        write_stability(output, cells, paths)
        return
    data = load_data(run, tokenizer) if config.selection.needs_batches else None
    begin_activity("warm-up")
    selection, scores = collect_and_select(model, data, config, args, engine)
    write(selection, scores, output)
    report_selection(run, output.with_suffix(".html"), selection, scores)
    if get_rank() == 0:
        print(f"{summary(selection)}; {scores.steps} steps, score {scores.score}; written to {run.output}", flush=True)


def write(selection: BlockSelection, scores: BlockScores, output: Path) -> None:
    """Write the selection and its scores, each whole or not at all; collective."""

    def write_both() -> None:
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_file(output, lambda beside: beside.write_text(selection.to_json()))
        save_scores(scores, scores_path(output))

    write_on_rank_zero(write_both, f"--output {output}", "writing the selection")


def plan_stability(run: SelectArguments, config: SMTConfig, args: SMTTrainingArguments) -> list[Cell]:
    """Return the selections to compare; none without --stability."""
    if run.stability is None:
        return []
    seed = args.seed if args.data_seed is None else args.data_seed
    return plan_cells(parse_axes(run.stability), config, seed, run.train_file)


def write_stability(output: Path, cells: list[Cell], paths: list[Path]) -> None:
    """Compare, write the figures and print their table; collective."""

    def write_figures() -> None:
        result = compare(cells, paths)
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_file(output, lambda beside: beside.write_text(json.dumps(result, indent=2) + "\n"))
        print(f"{table(result)}\nwritten to {output}", flush=True)

    write_on_rank_zero(write_figures, f"--output {output}", "comparing the selections")


def summary(selection: BlockSelection) -> str:
    """Describe the number of blocks and their spread over kinds of modules."""
    kinds = Counter()
    for module, blocks in selection.blocks.items():
        kinds[module.rpartition(".")[2]] += len(blocks)
    spread = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
    return f"{len(selection)} blocks of {selection.block_size[0]} x {selection.block_size[1]} ({spread})"


if __name__ == "__main__":
    run_program(main)
