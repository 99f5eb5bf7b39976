"""The capacity run, small: the same programs, engines and sampler as with 7B parameters."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from random_model import write_random_llama
from safetensors.torch import load_file
from tiers import slow
from transformers import AutoModelForCausalLM, AutoTokenizer

from smt_dist.memory.record.resident import Resident, ResidentSampler, descendants, resident_of
from smt_dist.models.cpu_products import PIECE, SinglePrecisionProducts, product

PROGRAM = Path(__file__).parents[1] / "launch" / "benchmarks" / "capacity.py"
SHAPE = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "layers": 2, "heads": 2}
MIB = 2**20


def run_capacity(folder: Path, **flags: object) -> subprocess.CompletedProcess[str]:
    given = {
        "folder": folder,
        **SHAPE,
        "block_size": 32,
        "sequence_length": 16,
        "learning_rate": 1e-2,
        "sample_seconds": 0.2,
        **flags,
    }
    words = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    return subprocess.run([sys.executable, str(PROGRAM), *words], capture_output=True, text=True, timeout=300)


def test_two_ranks_with_the_papers_score_in_passes(tmp_path):
    """A failure means that the run with 7B parameters, which CI can't afford, is broken as well."""
    flags = {"ranks": 2, "score": "abs_mean", "passes": 2, "warmup_steps": 1, "steps": 3, "limit": "8GiB"}
    finished = run_capacity(tmp_path, **flags)
    assert finished.returncode == 0, finished.stderr
    report = json.loads((tmp_path / "capacity_2_ranks_abs_mean.json").read_text())
    assert "engine fsdp2, 2 ranks" in finished.stderr
    assert "pass 2 of 2" in finished.stderr
    assert len(report["losses"]) == 3
    assert report["losses"][-1] < report["losses"][0]
    peak = report["peak"]
    # Two processes with PyTorch, which share its code.
    assert peak["resident"] > peak["proportional"] > peak["anonymous"] > 200 * MIB
    assert len(report["samples"]) > 3
    assert max(sample["resident"] for sample in report["samples"]) == peak["resident"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"score": "nonsense"}, "nonsense"),
        pytest.param({"fraction": 2}, "fraction", marks=slow),
        pytest.param({"heads": 3}, "heads 3", marks=slow),
        pytest.param({"vocab_size": 3}, "vocab_size 3", marks=slow),
    ],
)
def test_bad_flags_are_named_before_any_weight_is_written(tmp_path, flags, named):
    """A traceback after 13 GB of weights."""
    finished = run_capacity(tmp_path, **flags)
    assert finished.returncode == 2
    last = finished.stderr.rstrip().splitlines()[-1]
    assert last.startswith("capacity.py: error: ")
    assert named in last
    assert not list(tmp_path.rglob("*.safetensors"))


@slow
def test_memory_beyond_the_limit_is_an_error(tmp_path):
    """Else the claim to stay below it could not fail."""
    finished = run_capacity(tmp_path, steps=2, warmup_steps=1, limit="10MiB")
    assert finished.returncode == 2
    assert finished.stderr.rstrip().splitlines()[-1].startswith("capacity.py: error: the memory passed --limit 10MiB")


def test_the_sampler_sees_what_grandchildren_hold():
    """torchrun's ranks are children of children; a sampler that misses them reports a small launcher."""
    child = (
        "import subprocess, sys; "
        "subprocess.run([sys.executable, '-c', 'held = b\"x\" * (150 << 20); print(len(held), flush=True); input()'])"
    )
    process = subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        with ResidentSampler(process.pid, seconds=0.05) as sampler:
            assert process.stdout.readline().strip() == str(150 * MIB)
            while not sampler.samples:
                time.sleep(0.01)
            seen = len(sampler.samples)
            while len(sampler.samples) < seen + 2:
                time.sleep(0.01)
            assert len(descendants(process.pid)) == 2
            assert resident_of(process.pid).resident < 100 * MIB
        assert sampler.peak.anonymous > 150 * MIB
        assert sampler.peak.resident >= sampler.peak.proportional >= sampler.peak.anonymous
    finally:
        process.communicate("\n", timeout=20)
    assert resident_of(process.pid) == Resident()


def test_the_random_model_is_an_ordinary_one(tmp_path):
    """It must load by the usual way, with its whole vocabulary, and be written once."""
    folder = tmp_path / "model"
    write_random_llama(folder, **SHAPE)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.get_input_embeddings().weight.shape == (512, 128)
    assert AutoTokenizer.from_pretrained(folder)("t3 t511").input_ids == [3, 511]
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == SHAPE["layers"] + 3  # the embedding, the norm and the head have one each
    weights = load_file(files[0])
    written = files[0].stat().st_mtime_ns
    write_random_llama(folder, **SHAPE)
    assert files[0].stat().st_mtime_ns == written
    assert all(torch.isfinite(weight).all() for weight in weights.values())


# -- products of bf16 matrices ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("rows", [700, PIECE // 512 + 100])
def test_products_in_pieces_are_rounded_once(transposed, rows):
    """Against fp64: no sum may be rounded to bf16 on the way, whatever the pieces."""
    torch.manual_seed(0)
    weight = torch.randn(rows, 512).bfloat16()
    left = torch.randn(3, 512 if transposed else rows).bfloat16()
    right = weight.t() if transposed else weight
    exact = left.double() @ right.double()
    found = product(left, right, torch.empty(PIECE))
    assert found.dtype == torch.bfloat16
    error = (found.double() - exact).abs() / exact.abs().clamp(min=1)
    assert float(error.max()) <= 2**-8


def test_a_backward_inside_is_as_near_to_the_truth():
    """A linear layer and its input gradient; fp32 is left alone."""
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(96, 64), torch.randn(5, 96)

    def run(dtype: torch.dtype) -> list[torch.Tensor]:
        copy = torch.nn.Linear(96, 64).requires_grad_(False)
        copy.load_state_dict(layer.state_dict())
        inputs = x.detach().clone().to(dtype).requires_grad_()
        output = copy.to(dtype)(inputs)
        output.sum().backward()
        return [output.detach().float(), inputs.grad.float()]

    truth = run(torch.float32)
    with SinglePrecisionProducts():
        ours, same = run(torch.bfloat16), run(torch.float32)
    plain = run(torch.bfloat16)
    for exact, inside, outside, untouched in zip(truth, ours, plain, same, strict=True):
        assert torch.equal(exact, untouched)
        assert (inside - exact).norm() <= 1.05 * (outside - exact).norm()
