"""Times a whole training step of SMT and of its alternatives, interleaved, on a random-weight Llama.

Also measures each method's peak memory above the loaded model, in a fresh process each.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm, trange

from smt_dist import BlockScores, BlockSelection, SMTConfig, SMTError, apply_selection, select_blocks
from smt_dist.cli.program import natural, positive_int, raise_usage_error, run_program
from smt_dist.config import parse_model
from smt_dist.engines.sharded_optimizer import ShardedBlockOptimizer
from smt_dist.errors import require_peft
from smt_dist.memory.record.resident import own_bytes
from smt_dist.sparse.blocks import resolve_block_size
from smt_dist.sparse.forms import Form
from smt_dist.sparse.surgery import sparse_layers
from smt_dist.sparse.targets import count_parameters_2d, find_targets, weight_shape

if TYPE_CHECKING:  # transformers and PEFT are imported where they are used: `--help` should not wait for them
    from transformers import PreTrainedModel

RATIOS = [
    *(("smt", "floor"), ("smt_additive", "floor"), ("lora_cast", "floor"), ("smt", "smt_additive")),
    *(("smt", "lora"), ("smt", "lora_cast"), ("smt", "full"), ("smt_upper", "smt")),
    ("floor", "full"),  # the least that smt/full can be: blocks in the first layer need all input gradients
]


def parse_arguments() -> argparse.Namespace:
    """Read the command line; argparse itself exits with 2 on a bad flag."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    methods_help = "; ".join(f"{name}: {meaning}" for name, (meaning, _) in METHODS.items())
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help=methods_help)
    add("--repetitions", type=positive_int, default=20, help="timed steps of each method")
    add("--warmup_steps", type=positive_int, default=2, help="untimed steps of each method before them")
    add("--hidden_size", type=positive_int, default=1024, help="features of a layer's input")
    add("--intermediate_size", type=positive_int, default=2816, help="features inside the MLP")
    add("--layers", type=positive_int, default=8, help="number of layers")
    add("--heads", type=positive_int, default=16, help="attention heads")
    add("--vocab_size", type=positive_int, default=8000, help="tokens in the vocabulary; the head is not tied")
    add("--batch_size", type=positive_int, default=4, help="sequences a step")
    add("--sequence_length", type=positive_int, default=512, help="tokens a sequence")
    add("--block_size", type=positive_int, default=256, help="side of a square block, in elements")
    add("--targets", choices=["qkv", "all"], default="qkv", help="the layers' linear weights that get blocks or LoRA")
    add("--fraction", type=float, default=0.0265, help="share of the 2-D parameters that SMT trains, in (0, 1]")
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the model's weights")
    add("--threads", type=positive_int, help="CPU threads; None leaves the choice to torch")
    add("--seed", type=natural, default=0, help="of weights, tokens, blocks and bootstrap")
    add("--skip_memory", action="store_true", help="measure times only; peak memory needs Linux")
    add("--output", type=Path, help="JSON file to write: arguments, all times, ratios and peaks in bytes")
    # How this program starts itself to measure one method's peak; prints one number.
    add("--memory_of", choices=METHODS, help=argparse.SUPPRESS)
    parser.error = raise_usage_error
    return parser.parse_args()


def add_blocks(model: PreTrainedModel, arguments: argparse.Namespace, layers: range, form: Form = "in_place") -> None:
    """Attach random blocks in these layers, in the base's dtype: fp32 masters are the optimizer's."""
    selection = _random_selection(model, arguments, layers)
    apply_selection(model, selection, dtype=model.dtype, auto_form=form)


def _random_selection(model: PreTrainedModel, arguments: argparse.Namespace, layers: range) -> BlockSelection:
    """Blocks spread evenly over the targets: random scores under the strategy ``norm_dist``."""
    projections = r"self_attn\.[qkv]_proj" if arguments.targets == "qkv" else r"(self_attn|mlp)\.[a-z]+_proj"
    targets = rf".*\.layers\.({'|'.join(map(str, layers))})\.{projections}"
    group = {"name": "qkv", "target_modules": targets, "fraction": arguments.fraction}
    text = json.dumps({"groups": [group], "selection": {"strategy": "norm_dist"}})
    config = parse_model(SMTConfig, text, "the flags")
    groups = find_targets(model, config)
    shapes = {name: weight_shape(model.get_submodule(name)) for name in groups["qkv"]}
    side, _ = resolve_block_size(arguments.block_size, shapes)
    generator = torch.Generator().manual_seed(arguments.seed)
    tables = {
        name: torch.rand(rows // side, cols // side, dtype=torch.float64, generator=generator)
        for name, (rows, cols) in shapes.items()
    }
    scores = BlockScores((side, side), tables, shapes, groups, count_parameters_2d(model), "random", 1)
    return select_blocks(scores, config)


def add_lora(model: PreTrainedModel, arguments: argparse.Namespace, autocast: bool) -> None:
    """LoRA on the projections that :func:`add_blocks` trains, with the rank nearest to its trainable parameters."""
    require_peft("--methods lora")
    from peft import LoraConfig, get_peft_model

    selection = _random_selection(model, arguments, range(arguments.layers))
    rank = max(1, round(selection.parameters / sum(sum(shape) for shape in selection.shapes.values())))
    names = sorted({name.rpartition(".")[2] for name in selection.shapes})
    config = LoraConfig(r=rank, target_modules=names, lora_dropout=0.0)
    get_peft_model(model, config, autocast_adapter_dtype=autocast)


METHODS: dict[str, tuple[str, Callable[[Any, argparse.Namespace], object]]] = {
    "smt": (
        "SMT blocks inside the weights, random, evenly spread over --targets",
        lambda m, a: add_blocks(m, a, range(a.layers)),
    ),
    "smt_additive": ("the same blocks beside the weights", lambda m, a: add_blocks(m, a, range(a.layers), "additive")),
    "smt_upper": (
        "as smt, all in the upper half of the layers, so that the lower half needs no backward",
        lambda m, a: add_blocks(m, a, range(a.layers // 2, a.layers)),
    ),
    "lora": (
        "PEFT LoRA on --targets, nearest number of trainable parameters, in fp32 (PEFT's default)",
        lambda m, a: add_lora(m, a, autocast=True),
    ),
    "lora_cast": ("as lora, in --dtype: no fp32 masters", lambda m, a: add_lora(m, a, autocast=False)),
    "full": ("all weights; they, their gradients and moments in --dtype", lambda m, _: m.requires_grad_(True)),
    "floor": (
        "forward and input gradients only, down to the embeddings' output",
        lambda m, _: m.requires_grad_(False).enable_input_require_grads(),
    ),
}


class Run:
    """A method ready to train: a model with weights of its own, an optimizer and a fixed batch."""

    def __init__(self, method: str, arguments: argparse.Namespace, model: PreTrainedModel | None = None) -> None:
        self.model = model if model is not None else build_model(arguments)
        _, prepare = METHODS[method]
        prepare(self.model, arguments)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.trainable = sum(parameter.numel() for parameter in trained)
        self.optimizer = self._make_optimizer(trained)
        shape = (arguments.batch_size, arguments.sequence_length)
        generator = torch.Generator().manual_seed(arguments.seed)
        self.tokens = torch.randint(arguments.vocab_size, shape, generator=generator)

    def _make_optimizer(self, trained: list[torch.nn.Parameter]) -> torch.optim.Optimizer | None:
        if not trained:
            return None
        if sparse_layers(self.model):
            groups = [{"params": trained, "lr": 1e-4}]
            return ShardedBlockOptimizer(groups, torch.optim.AdamW, {"fused": True}, model=self.model)
        return torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step(self) -> float:
        """One whole training step; returns its seconds."""
        start = time.perf_counter()
        if self.optimizer is not None:
            self.optimizer.zero_grad()
        self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        return time.perf_counter() - start


def build_model(arguments: argparse.Namespace) -> PreTrainedModel:
    """A Llama with seeded random weights, made directly in ``--dtype``: no copy in another one inflates the peak."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if arguments.hidden_size % (2 * arguments.heads):
        raise SMTError(f"--hidden_size {arguments.hidden_size}: must be a multiple of 2 x --heads {arguments.heads}")
    config = LlamaConfig(
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.intermediate_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        vocab_size=arguments.vocab_size,
        max_position_embeddings=arguments.sequence_length,
        dtype=getattr(torch, arguments.dtype),
    )
    torch.manual_seed(arguments.seed)
    return LlamaForCausalLM._from_config(config).train()


def time_steps(runs: dict[str, Run], warmup_steps: int, repetitions: int) -> dict[str, list[float]]:
    """Seconds of each method's steps; repetition i of all methods is one stretch of time, in rotating order."""
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for repetition in trange(-warmup_steps, repetitions, desc="steps of every method", unit="repetition"):
        first = repetition % len(names)
        for name in names[first:] + names[:first]:
            elapsed = runs[name].step()
            if repetition >= 0:
                seconds[name].append(elapsed)
    return seconds


def measure_peak(method: str, arguments: argparse.Namespace, steps: int = 3) -> int:
    """Bytes of this process's peak resident memory over a few steps, above the loaded model (Linux)."""
    model = build_model(arguments)
    loaded = own_bytes("VmRSS")
    with contextlib.suppress(OSError):  # where it is forbidden, the mark includes loading, which the steps outgrow
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
    run = Run(method, arguments, model)
    for _ in range(steps):
        run.step()
    return own_bytes("VmHWM") - loaded


def measure_peaks(methods: Iterable[str]) -> dict[str, int]:
    """Peak bytes above the loaded model, each method in a fresh process with this one's flags."""
    # glibc keeps freed memory for later; with every tensor mapped on its own, what is resident is what is alive.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    peaks = {}
    for method in tqdm(list(methods), desc="peak memory", unit="method"):
        command = [sys.executable, __file__, *sys.argv[1:], "--memory_of", method]
        finished = subprocess.run(command, env=environment, capture_output=True, text=True)
        if finished.returncode:
            raise SMTError(f"peak memory of {method}: {(finished.stderr.strip() or 'killed').splitlines()[-1]}")
        peaks[method] = int(finished.stdout.split()[-1])
    return peaks


def paired_ratio(numerator: list[float], denominator: list[float], seed: int) -> dict[str, float]:
    """Median of the per-repetition ratios, with a 95 % bootstrap interval of that median."""
    ratios = np.array(numerator) / np.array(denominator)
    samples = np.random.default_rng(seed).choice(ratios, (10_000, len(ratios)))
    low, high = np.percentile(np.median(samples, axis=1), [2.5, 97.5])
    return {"median": float(np.median(ratios)), "low": float(low), "high": float(high)}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that ``--output`` holds: arguments, environment, methods, time and memory ratios."""
    skip = arguments.skip_memory or not Path("/proc/self/status").exists()
    peaks = {} if skip else measure_peaks(arguments.methods)
    runs = {method: Run(method, arguments) for method in arguments.methods}
    seconds = time_steps(runs, arguments.warmup_steps, arguments.repetitions)
    pairs = [(above, below) for above, below in RATIOS if above in runs and below in runs]
    return {
        "arguments": vars(arguments),
        "environment": {"torch": torch.__version__, "threads": torch.get_num_threads()},
        "model_parameters": sum(parameter.numel() for parameter in build_model(arguments).parameters()),
        "methods": {
            method: {"trainable": run.trainable, "seconds": seconds[method], "peak_memory_bytes": peaks.get(method)}
            for method, run in runs.items()
        },
        "time_ratios": {f"{a}/{b}": paired_ratio(seconds[a], seconds[b], arguments.seed) for a, b in pairs},
        "memory_ratios": {f"{a}/{b}": peaks[a] / peaks[b] for a, b in pairs if peaks},
    }


def print_report(report: dict[str, Any]) -> None:
    """The table on stdout."""
    arguments, environment = report["arguments"], report["environment"]
    print(
        f"Llama of {report['model_parameters']:,} parameters in {arguments['dtype']}, {arguments['batch_size']} x "
        f"{arguments['sequence_length']} tokens a step, {arguments['repetitions']} interleaved repetitions, "
        f"{environment['threads']} threads, torch {environment['torch']}\n\n"
        f"{'method':<10} {'trainable':>11} {'median s':>9} {'quartiles s':>15} {'min .. max s':>15} {'peak MiB':>9}"
    )
    for method, result in report["methods"].items():
        least, lower, median, upper, most = np.percentile(result["seconds"], [0, 25, 50, 75, 100])
        print(
            f"{method:<10} {result['trainable']:>11,} {median:>9.3f} {lower:>6.3f} .. {upper:<5.3f} "
            f"{least:>6.3f} .. {most:<5.3f} {(result['peak_memory_bytes'] or math.nan) / 2**20:>9.0f}"
        )
    print(f"\n{'ratio':<16} {'time, median of pairs':>21} {'95 % interval':>16} {'peak':>7}")
    for pair, ratio in report["time_ratios"].items():
        print(
            f"{pair:<16} {ratio['median']:>21.3f} {ratio['low']:>7.3f} .. {ratio['high']:.3f} "
            f"{report['memory_ratios'].get(pair, math.nan):>7.3f}"
        )


def main() -> None:
    """Measure, print the table, write the JSON."""
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.memory_of:
        print(measure_peak(arguments.memory_of, arguments))
        return
    if arguments.output:
        check_output(arguments.output)
    report = measure(arguments)
    print_report(report)
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1, default=str) + "\n")


def check_output(path: Path) -> None:
    """Fail before the measurement, not after it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        raise SMTError(f"--output {path}: {error.strerror}") from None


if __name__ == "__main__":
    run_program(main)
