"""Run the warm-up only and write the chosen blocks, for `train.py --selection`.

[deepspeed --num_gpus N | torchrun --nproc_per_node N | python] launch/select_blocks.py
    --smt_config S.json --model_name_or_path M --train_file T.json --output selection.json
    [any transformers.TrainingArguments flag, such as --per_device_train_batch_size]
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from transformers import set_seed

from smt_dist.blocks import BlockSelection
from smt_dist.cli import parse_arguments, run_program
from smt_dist.distributed import agree, barrier, get_rank
from smt_dist.errors import SMTError
from smt_dist.files import replace_file
from smt_dist.loading import initialize_process_group, load_tokenizer_and_model
from smt_dist.run import (
    RunArguments,
    check_writable,
    collect_and_select,
    draw,
    load_config,
    load_data,
)
from smt_dist.score_files import save_scores, scores_path


@dataclass
class SelectArguments(RunArguments):
    """What to select on, and where to write it."""

    output: str = field(default="selection.json", metadata={"help": "the selection file to write"})


def main() -> None:
    run, args = parse_arguments(SelectArguments, __doc__)
    run.check()
    if run.selection or run.adapter:
        raise SMTError("--selection and --adapter belong to train.py: this program makes the selection")
    if run.eval_file:
        raise SMTError("--eval_file: this program evaluates nothing")
    initialize_process_group(args)
    set_seed(args.seed)
    output = Path(run.output)
    agree(lambda: check_writable("--output", output.parent), "the output folder")
    config = agree(lambda: load_config(run, None, None, None), "the SMT config")
    if config.warmup.mode == "full_ft":
        raise SMTError("warmup.mode full_ft moves the base, which this program doesn't keep: run train.py")
    if config.selection.needs_batches:
        run.check_data()
    tokenizer, model = load_tokenizer_and_model(run, args)
    data = load_data(run, tokenizer) if config.selection.needs_batches else None
    selection, scores = collect_and_select(model, data, config, args)
    if get_rank() == 0:
        output.parent.mkdir(parents=True, exist_ok=True)
        replace_file(output, lambda beside: beside.write_text(selection.to_json()))
        save_scores(scores, scores_path(output))
        print(f"{summary(selection)}; {scores.steps} steps, score {scores.score}; written to {run.output}", flush=True)
    draw(run, output.with_suffix(".html"), selection, scores)
    barrier()


def summary(selection: BlockSelection) -> str:
    """The number of blocks, and how they spread over module kinds."""
    kinds = Counter()
    for module, blocks in selection.blocks.items():
        kinds[module.rpartition(".")[2]] += len(blocks)
    spread = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common())
    return f"{len(selection)} blocks of {selection.block_size[0]} x {selection.block_size[1]} ({spread})"


if __name__ == "__main__":
    run_program(main)
