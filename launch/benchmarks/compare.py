"""Is SMT worth it? Trains a model by SMT, full fine-tuning, LoRA, DoRA and SHiRA, and compares what they reach.

All methods see the same batches in the same order, with the same steps and schedule. Learning rates are chosen from a
grid by validation loss with the first seed, at the middle budget, and where a budget has a grid of its own
(METHOD@BUDGET=A,B); the test set is read only after that, by processes of their own. Every run is a process and a
file: run the command again to go on.

Writes comparison.json, comparison.md, comparison.png and comparison.html to --output.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from comparison.methods import DEFAULT_METHODS, DEFAULT_RATES
from comparison.settings import DTYPES, TUNE, Settings, parse_methods, parse_rates
from comparison.tasks import TASKS, Counts

from smt_dist.cli.program import HelpFormatter, configure_logging, positive_int, raise_usage_error, run_program
from smt_dist.config import SCORES
from smt_dist.errors import SMTError


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    add, standard = parser.add_argument, Settings(())
    add("--model_name_or_path", required=True, help="model folder or hub name")
    add("--task", required=True, metavar="TASK", help=f"{', '.join(TASKS)}; math: the rows of --data_folder")
    add("--data_folder", type=Path, help="for math: a folder with train.json, and test.json or test/*.json")
    add("--output", type=Path, required=True, help="folder for cells, table and plots")
    names = f"base, full, lora, dora, shira, smt:SCORE with SCORE of {', '.join(SCORES)} or a function's dotted name"
    add("--methods", nargs="+", default=list(DEFAULT_METHODS), metavar="METHOD", help=names)
    add("--budgets", nargs="+", type=float, default=list(standard.budgets), help="trainable share of all parameters")
    add("--seeds", nargs="+", type=int, default=list(standard.seeds), help="of data order, adapters, random blocks")
    grids = " ".join(f"{name}={','.join(f'{rate:g}' for rate in rates)}" for name, rates in DEFAULT_RATES.items())
    add("--learning_rates", nargs="+", default=[], metavar="METHOD[@BUDGET]=A,B", help=f"grids, over these: {grids}")
    add("--tune", default=standard.tune, help=f"{' or '.join(TUNE)}: one learning rate for all scores of SMT")
    add("--targets", nargs="+", default=list(standard.targets), help="modules for blocks and adapters alike")
    add("--block_size", type=positive_int, default=standard.block_size, help="side of SMT's blocks, in elements")
    add("--selection_steps", type=positive_int, default=standard.selection_steps, help="batches that SMT scores")
    add("--strategy", default=standard.strategy, help="of SMT's selection: even, no_restriction or norm_dist")
    add("--steps", type=positive_int, default=standard.steps, help="optimizer steps of every method")
    add("--batch_size", type=positive_int, default=standard.batch_size, help="rows a step")
    add("--max_seq_length", type=positive_int, default=standard.max_seq_length, help="tokens; longer rows are cut")
    add("--prompt_style", default=standard.prompt_style, help="plain (Alpaca template) or chat (chat template)")
    base_help = f"{' or '.join(DTYPES)}: the base's, for all methods; what is trained has fp32 masters"
    add("--dtype", default=standard.dtype, help=base_help)
    add("--train_items", type=positive_int, help="rows to train on; None: 5000 drawn, or all of the folder's")
    add("--validation_items", type=positive_int, default=Counts.validation, help="rows for the validation loss")
    add("--test_items", type=positive_int, default=standard.test_items, help="questions to answer")
    add("--max_new_tokens", type=positive_int, default=standard.max_new_tokens, help="tokens of an answer")
    add("--eval_batch_size", type=positive_int, default=standard.eval_batch_size, help="rows a pass, not training")
    add("--max_cells", type=positive_int, help="end after as many cells; the same command goes on")
    add("--hours", type=float, help="start no cell that isn't expected to be done by then")
    add("--keep_artefacts", action="store_true", help="keep all trained adapters and models")
    add("--table", action="store_true", help="run nothing: write and print the table of what is there")
    add("--list", action="store_true", help="run nothing: print the cells and what they cost")
    parser.error = raise_usage_error
    return parser.parse_args()


def read_settings(arguments: argparse.Namespace) -> Settings:
    """The settings that the flags ask for. Raises SMTError for a wrong one."""
    same = {name: getattr(arguments, name) for name in vars(Settings(())) if hasattr(arguments, name)}
    lists = {
        "methods": parse_methods(arguments.methods),
        "budgets": tuple(sorted(arguments.budgets)),
        "seeds": tuple(arguments.seeds),
        "targets": tuple(arguments.targets),
        "rates": parse_rates(arguments.learning_rates),
    }
    if arguments.hours is not None and not arguments.hours > 0:
        raise SMTError(f"--hours: {arguments.hours:g} is not above 0")
    return Settings(**{**same, **lists})


def main() -> None:
    """Run the missing cells, then write and print the table."""
    arguments = parse_arguments()
    configure_logging()
    settings = read_settings(arguments)
    # Imported late: `--help` and bad flags should answer at once.
    from comparison.build import build_plan, write_report
    from comparison.runner import Limits, list_cells, run_missing

    from smt_dist.cli.program import check_writable

    check_writable("--output", arguments.output)
    counts = Counts(arguments.train_items, arguments.validation_items, arguments.test_items)
    source = arguments.data_folder
    plan, unreachable = build_plan(
        settings, arguments.model_name_or_path, arguments.task, source, counts, arguments.output
    )
    for line in unreachable:
        print(line, file=sys.stderr)
    if arguments.list:
        print(list_cells(plan))
        return
    if arguments.table:
        print(write_report(plan, arguments.output))
        return
    limits = Limits(arguments.max_cells, arguments.hours, arguments.keep_artefacts)
    try:
        outcome = run_missing(plan, limits, lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
    print(f"\n{write_report(plan, arguments.output)}\nwritten to {arguments.output}")
    if outcome.stopped:
        print(f"ended early by {outcome.stopped}; the same command goes on")
    for label, problem in outcome.failed:
        print(f"failed: {label}: {problem}", file=sys.stderr)
    if outcome.failed:
        sys.exit(1)


if __name__ == "__main__":
    run_program(main)
