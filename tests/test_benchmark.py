"""The benchmark runs as a program, writes what it promises, and SMT's step beats full fine-tuning's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tiers import slow

PROGRAM = Path(__file__).parents[1] / "launch" / "benchmarks" / "step.py"
# Few tokens for many weights: full fine-tuning's AdamW alone takes longer than SMT's whole step. One thread, as
# threads that wait for each other measure how busy the machine is.
SMALL = {"hidden_size": 512, "intermediate_size": 2048, "layers": 4, "heads": 8, "vocab_size": 4000, "threads": 1}
SHORT = {"batch_size": 1, "sequence_length": 32, "warmup_steps": 1, "repetitions": 9}


def run_benchmark(*flags: str) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own."""
    return subprocess.run([sys.executable, str(PROGRAM), *flags], capture_output=True, text=True, timeout=300)


def test_smt_beats_full_fine_tuning_and_the_report_is_complete(tmp_path: Path) -> None:
    """A failure means that the benchmark is broken, or that SMT lost its reason to exist."""
    output = tmp_path / "results" / "benchmark.json"
    shape = [f"--{flag}={value}" for flag, value in {**SMALL, **SHORT}.items()]
    finished = run_benchmark("--methods", "smt", "full", *shape, "--output", str(output))
    assert finished.returncode == 0, finished.stderr
    assert "smt/full" in finished.stdout
    report = json.loads(output.read_text())
    assert set(report["methods"]) == {"smt", "full"}
    for method in report["methods"].values():
        assert set(method) == {"trainable", "seconds", "peak_memory_bytes"}
        assert len(method["seconds"]) == 9
    assert set(report["time_ratios"]["smt/full"]) == {"median", "low", "high"}
    assert report["time_ratios"]["smt/full"]["median"] < 1
    assert "smt/full" in report["memory_ratios"]


@slow
def test_a_bad_shape_gets_one_line() -> None:
    """A failure means a traceback where one line would do."""
    finished = run_benchmark("--hidden_size", "100", "--skip_memory")
    assert finished.returncode == 2
    assert "--hidden_size 100: must be a multiple of" in finished.stderr
    assert "Traceback" not in finished.stderr
