"""Train a model as large as this machine allows, with launch/train.py, and watch the memory of all its processes.

python launch/benchmarks/capacity.py --ranks 2 --score mean_abs --folder outputs/capacity
launch/benchmarks/capacity.sh      (all runs)

The model is a Llama with random weights (Llama-2-7B's shape unless told otherwise), written layer by layer: it never
lies in memory whole. Every step trains on one and the same batch, so its loss must fall. Ends with 2 if it doesn't, or
if the memory passes --limit. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smt_dist.cli.program import HelpFormatter, configure_logging, positive_int, raise_usage_error, run_program
from smt_dist.errors import SMTError

if TYPE_CHECKING:  # imported where they are used: `--help` should not wait for torch
    from smt_dist.memory.record.resident import Resident, ResidentSampler

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
SHAPE = {
    "vocab_size": (32000, "tokens in the vocabulary"),
    "hidden_size": (4096, "features of a layer's input"),
    "intermediate_size": (11008, "features inside the MLP"),
    "layers": (32, "number of layers"),
    "heads": (32, "attention heads"),
}


def parse_arguments() -> argparse.Namespace:
    """Read the command line. Raises SMTError, naming the flag."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--folder", type=Path, default=Path("outputs/capacity"), help="model, data and results; a model there is kept")
    add("--ranks", type=positive_int, default=1, help="processes; from 2 on the base is sharded by --engine fsdp2")
    add("--score", default="mean_abs", help="of the warm-up, as in the smt config")
    add("--passes", type=positive_int, default=1, help="of the warm-up, as in the smt config")
    add("--warmup_steps", type=positive_int, default=2, help="steps of the warm-up")
    add("--steps", type=positive_int, default=3, help="steps of the training")
    add("--sequence_length", type=positive_int, default=64, help="tokens a row; one row a rank")
    add("--fraction", type=float, default=0.0084, help="share of the 2-D parameters that SMT trains, in (0, 1]")
    add("--block_size", type=positive_int, default=256, help="side of a square block, in elements")
    add("--learning_rate", type=float, default=1e-3, help="AdamW's")
    add("--sample_seconds", type=float, default=2.0, help="between two looks at the memory; each takes a while")
    add("--limit", default="20GiB", help="resident memory of all processes: 20GiB (2^30 bytes each) or 20GB (10^9)")
    for name, (default, meaning) in SHAPE.items():
        add(f"--{name}", type=positive_int, default=default, help=meaning)
    parser.error = raise_usage_error
    return parser.parse_args()


def main() -> None:
    """Make what is missing, run, judge, write ``capacity_*.json``."""
    from smt_dist.memory.plan.categories import parse_size

    arguments = parse_arguments()
    configure_logging()
    limit = parse_size(arguments.limit)
    if not Path("/proc/self/smaps_rollup").exists():
        raise SMTError("capacity.py reads resident memory from /proc/*/smaps_rollup, which this system doesn't have")
    folder = arguments.folder.absolute()
    files = prepare(folder, arguments)
    name = f"{arguments.ranks}_ranks_{arguments.score}"
    sampler, seconds = run(command(arguments, files, folder / name), arguments.ranks, arguments.sample_seconds)
    losses = read_losses(folder / name, arguments.steps)
    report = {
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()},
        "seconds": seconds,
        "losses": losses,
        "peak": vars(sampler.peak),
        "samples": [{"seconds": passed, **vars(sample)} for passed, sample in sampler.samples],
    }
    (folder / f"capacity_{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"{name}: {seconds:.0f} s, losses {', '.join(f'{loss:.4f}' for loss in losses)}; peak {_text(sampler.peak)}")
    if sampler.peak.resident > limit:
        raise SMTError(f"the memory passed --limit {arguments.limit}: {_text(sampler.peak)}")
    if not losses[-1] < losses[0]:
        raise SMTError(f"the loss on a repeated batch didn't fall: {losses[0]:.4f} to {losses[-1]:.4f}")


def run(program: list[str], ranks: int, every: float) -> tuple[ResidentSampler, float]:
    """Run a program and sample it, to its end. Raises SMTError if it fails."""
    from smt_dist.memory.record.resident import ResidentSampler

    cores = len(os.sched_getaffinity(0))
    environment = os.environ | {
        "OMP_NUM_THREADS": str(max(1, cores // ranks)),
        "TOKENIZERS_PARALLELISM": "false",
        # glibc keeps what is freed for later; with every larger tensor mapped on its own, resident is what is alive.
        "MALLOC_MMAP_THRESHOLD_": str(2**22),
        # In huge pages, where the system has them on request: gathered weights come and go, and each page costs.
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }
    started = time.monotonic()
    process = subprocess.Popen(program, env=environment)
    # If memory runs out, this run is the one to end, not its neighbours.
    Path(f"/proc/{process.pid}/oom_score_adj").write_text("500")
    try:
        with ResidentSampler(process.pid, every, _Lines()) as sampler:
            code = process.wait()
    finally:
        process.terminate()
    if code:
        raise SMTError(f"train.py ended with {code}; peak {_text(sampler.peak)}")
    return sampler, time.monotonic() - started


class _Lines:
    """One line every so often, beside the progress bars of the program itself."""

    def __init__(self, every: float = 30) -> None:
        self._every, self._next, self._highest = every, every, 0

    def __call__(self, seconds: float, resident: Resident) -> None:
        self._highest = max(self._highest, resident.resident)
        if seconds >= self._next:
            self._next += self._every
            print(f"{seconds:6.0f} s  {_text(resident)}; highest so far {_gib(self._highest)}", flush=True)


def _text(resident: Resident) -> str:
    return (
        f"resident {_gib(resident.resident)} (anonymous {_gib(resident.anonymous)}, PSS {_gib(resident.proportional)})"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def command(arguments: argparse.Namespace, files: dict[str, Path], output: Path) -> list[str]:
    """train.py with its flags, under torchrun where there is more than one rank."""
    flags: dict[str, Any] = {
        "model_name_or_path": files["model"],
        "train_file": files["train"],
        "smt_config": files["smt"],
        "output_dir": output,
        "max_seq_length": arguments.sequence_length,
        "per_device_train_batch_size": 1,
        "max_steps": arguments.steps,
        "learning_rate": arguments.learning_rate,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": arguments.steps,
        "report_to": "none",
        "cpu_fp32_products": True,
    }
    launcher = [sys.executable]
    if arguments.ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={arguments.ranks}"]
        flags |= {"engine": "fsdp2", "fsdp2_units": "weight"}
    return [*launcher, str(TRAIN), *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]


def read_losses(output: Path, steps: int) -> list[float]:
    """What Trainer logged, from the last checkpoint."""
    state = json.loads((output / f"checkpoint-{steps}" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


# -- model, data and config ------------------------------------------------------------------------------------------


def prepare(folder: Path, arguments: argparse.Namespace) -> dict[str, Path]:
    """The files of a run; a model of this shape that is there already is kept."""
    from random_model import write_random_llama

    from smt_dist.config import SMTConfig, parse_model

    shape = {name: getattr(arguments, name) for name in SHAPE}
    model = folder / ("model_" + "_".join(map(str, shape.values())))
    smt = {
        "block_size": arguments.block_size,
        "groups": [{"name": "attention", "fraction": arguments.fraction}],
        "selection": {"score": arguments.score},
        "warmup": {"steps": arguments.warmup_steps, "passes": arguments.passes},
    }
    files = {"model": model, "smt": folder / "smt.json", "train": folder / "train.json"}
    config: SMTConfig = parse_model(
        SMTConfig, json.dumps(smt), "--block_size, --fraction, --score, --warmup_steps, --passes"
    )
    write_random_llama(model, **shape, progress=True)
    files["smt"].write_text(config.to_json())
    rows = [
        {"text": " ".join(f"t{(31 * place + 7 * row) % (arguments.vocab_size - 3) + 3}" for place in range(4096))}
        for row in range(arguments.ranks)
    ]
    files["train"].write_text(json.dumps(rows))
    return files


if __name__ == "__main__":
    run_program(main)
