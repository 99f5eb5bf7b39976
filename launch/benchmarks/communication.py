"""Calls and bytes that a training step moves between ranks, SMT beside full fine-tuning.

First on real gloo ranks with a small Llama, every engine; then for large models on the fake process group, at full
depth, with ZeRO's figures derived from those of the real ranks. A call's bytes are those of the whole tensor: what an
all-gather ends with, what a reduce-scatter or all-reduce starts from. "sent" is what a rank sends in a ring.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from step import check_output
from tqdm import tqdm

from smt_dist import SMTError
from smt_dist.cli.program import HelpFormatter, positive_int, raise_usage_error, run_program

ENGINES = ("ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")
MODEL_NAMES = ("llama-2-7b", "llama-3-70b")  # the keys of communication_fake.MODELS, which takes seconds to import
KINDS = ("all_gather", "reduce_scatter", "all_reduce")
TIMEOUT = 600  # seconds, for one engine on real ranks
Row = dict[str, Any]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--engines", nargs="+", choices=ENGINES, default=list(ENGINES), help="hsdp: two replicas, or one a node of 8")
    add("--ranks", type=positive_int, default=2, help="real processes; an even number for hsdp")
    add("--steps", type=positive_int, default=3, help="counted steps on real ranks, after two that aren't")
    add("--layers", type=positive_int, default=4, help="of the small Llama on real ranks (hidden size 256)")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the small Llama's weights")
    add("--models", nargs="*", choices=MODEL_NAMES, default=list(MODEL_NAMES), help="large models, bf16, no memory")
    add("--output", type=Path, help="JSON file to write: every row, in bytes a step")
    parser.error = raise_usage_error
    arguments = parser.parse_args()
    if arguments.ranks < 2 or ("hsdp" in arguments.engines and arguments.ranks % 2):
        raise SMTError(f"--ranks {arguments.ranks}: one rank sends nothing, and hsdp needs an even number")
    return arguments


def count_on_real_ranks(arguments: argparse.Namespace) -> list[Row]:
    """Starts the ranks of one engine after the other."""
    from communication_ranks import make_model

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_model(folder / "model", arguments.layers)
        rows = []
        for engine in tqdm(arguments.engines, desc="real ranks", unit="engine"):
            rows += _count_engine(engine, folder, arguments)
    return rows


def _count_engine(engine: str, folder: Path, arguments: argparse.Namespace) -> list[Row]:
    program = Path(__file__).with_name("communication_ranks.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(arguments.ranks)]
    command = [*launcher, str(program), engine, str(folder), arguments.dtype, str(arguments.steps)]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise SMTError(f"--engines {engine}: its ranks didn't finish within {TIMEOUT} s") from None
    if finished.returncode:
        lines = [line for line in finished.stderr.splitlines() if "Error" in line] or finished.stderr.splitlines()
        raise SMTError(f"--engines {engine}: {lines[0].strip() if lines else 'killed'}")
    return json.loads((folder / f"{engine}.json").read_text())


def count_large_models(models: list[str], engines: list[str]) -> list[Row]:
    """What FSDP2 and DDP do, counted, and what ZeRO does, derived."""
    from communication_fake import MODELS, count, plan, sizes

    rows = [count(*case) for case in tqdm(plan(models, engines), desc="large models", unit="case")]
    for model in models:
        for engine in (engine for engine in engines if engine.startswith("zero")):
            rows += derive_zero(model, MODELS[model][0], engine, *sizes(model))
    return rows


def derive_zero(model: str, ranks: int, engine: str, base: int, selected: int) -> list[Row]:
    """ZeRO's rows by the law that its rows on real ranks follow; DeepSpeed doesn't run on fake tensors.

    With P base elements and N block elements in bf16, and gradients reduced in fp32 (smt_dist's default):
    ZeRO-1 and 2 all-reduce 4 N bytes and gather 2 N; ZeRO-3 reduce-scatters 4 N, and gathers blocks and at most the
    whole base for the forward and again for the backward: 2 x 2 (P + N). Full fine-tuning has P for N, and no blocks.
    """

    def total(size: int, factor: int = 1) -> dict[str, float | None]:
        return {"calls": None, "bytes": size, "sent": factor * size * (ranks - 1) / ranks}

    rows = []
    for method, trained in (("smt", selected), ("full", base)):
        blocks = {"all_reduce": total(4 * trained, 2), "all_gather": total(2 * trained)}
        kinds = blocks
        if engine == "zero3":
            blocks = {"reduce_scatter": total(4 * trained), "all_gather": total(4 * trained)}
            kinds = blocks | {"all_gather": total(4 * (base + (trained if method == "smt" else 0)))}
        names = {"model": model, "ranks": ranks, "engine": engine, "method": method, "source": "derived"}
        rows.append(names | {"trained": trained, "kinds": kinds, "blocks": blocks if method == "smt" else {}})
    return rows


def print_rows(rows: list[Row], unit: str, size: float) -> None:
    """A table: calls / bytes of each kind, all bytes, what a rank sends, and what of it all is the blocks'."""
    heads = [*KINDS, "other", "all kinds", "sent", "the blocks' own"]
    head = "".join(f"{text:>18}" for text in heads)
    print(f"{'engine':<7}{'method':<7}{'trained':>15}{head}   (calls / {unit} a step)")
    for row in rows:
        others = [kind for kind in row["kinds"] if kind not in KINDS]
        sent = sum(total["sent"] for total in row["kinds"].values()) / size
        cells = [_cell(row["kinds"], [kind], size) for kind in KINDS]
        cells += [_cell(row["kinds"], others, size), _cell(row["kinds"], row["kinds"], size), f"{sent:.3f}"]
        cells.append(_cell(row["blocks"], row["blocks"], size))
        print(f"{row['engine']:<7}{row['method']:<7}{row['trained']:>15,}" + "".join(f"{cell:>18}" for cell in cells))


def _cell(kinds: dict[str, Any], names: Iterable[str], size: float) -> str:
    totals = [kinds[name] for name in names if name in kinds]
    if not totals:
        return "-"
    calls = "?" if any(total["calls"] is None for total in totals) else f"{sum(t['calls'] for t in totals):g}"
    return f"{calls} / {sum(total['bytes'] for total in totals) / size:.3f}"


def print_report(report: dict[str, Any]) -> None:
    """Both tables."""
    arguments = report["arguments"]
    base = report["real_ranks"][0]["parameters"]
    print(
        f"\n{arguments['ranks']} gloo ranks, Llama of {base:,} parameters in {arguments['dtype']}, mean of "
        f"{arguments['steps']} steps; SMT with Trainer's own (two scalars a log, one token count a step)"
    )
    print_rows(report["real_ranks"], "MB", 1e6)
    for model in arguments["models"]:
        for source in ("counted", "derived"):
            rows = [row for row in report["large_models"] if row["model"] == model and row["source"] == source]
            if rows:
                how = "fake process group, all layers" if source == "counted" else "derived: at most, see --output"
                print(f"\n{model}, {rows[0]['ranks']} ranks, bf16, one micro-batch a step ({how})")
                print_rows(rows, "GB", 1e9)


def main() -> None:
    """Count, print both tables, write the JSON."""
    arguments = parse_arguments()
    if arguments.output:
        check_output(arguments.output)
    real = count_on_real_ranks(arguments)
    report = {
        "arguments": vars(arguments),
        "environment": {"torch": torch.__version__},
        "real_ranks": real,
        "large_models": count_large_models(arguments.models, arguments.engines) if arguments.models else [],
        "derivation_of_zero": derive_zero.__doc__,
    }
    print_report(report)
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1, default=str) + "\n")


if __name__ == "__main__":
    run_program(main)
