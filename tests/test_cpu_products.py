"""Programs multiply in fp32 where the CPU has no bf16 instructions, and the user may say otherwise."""

from __future__ import annotations

import copy
import logging
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from architectures import make_model
from torch.nn.functional import linear

from smt_dist.models import cpu_products
from smt_dist.models.cpu_products import SinglePrecisionProducts, find_bf16_instructions, fp32_products
from smt_dist.training.arguments import SMTTrainingArguments

product = cpu_products.product
LAUNCH = Path(__file__).parents[1] / "launch"
AVX2 = "flags\t\t: fpu sse2 avx avx2 fma"
CPUS = [
    (AVX2, False),
    (f"{AVX2} avx512f avx512_vnni", False),
    (f"{AVX2} avx512f avx512_bf16", True),
    (f"{AVX2} amx_bf16 amx_tile", True),
    ("Features\t: fp asimd sve i8mm bf16", True),
    ("Features\t: fp asimd", False),
    ("", True),  # not Linux: torch's word alone counts
]


@pytest.fixture
def this_cpu(monkeypatch, tmp_path):
    """Let the tests say what torch and Linux say of the CPU; gives the function to say it with."""

    def become(cpu_info: str, torch_has_bf16: bool = True) -> None:
        (tmp_path / "cpuinfo").write_text(cpu_info)
        monkeypatch.setattr(cpu_products, "CPU_INFO", tmp_path / "cpuinfo")
        monkeypatch.setattr(cpu_products, "_onednn_has_bf16", lambda: torch_has_bf16)

    return become


@pytest.mark.parametrize(("cpu_info", "has"), CPUS)
def test_what_linux_says_of_the_cpu_is_read(this_cpu, cpu_info, has):
    this_cpu(cpu_info)
    assert find_bf16_instructions()[0] is has
    assert find_bf16_instructions(cpu_info)[0] is has


def test_where_torch_has_no_kernels_the_instructions_do_not_help(this_cpu):
    this_cpu(f"{AVX2} avx512_bf16", torch_has_bf16=False)
    assert find_bf16_instructions() == (False, "torch has no bf16 kernels for this CPU")


def test_a_cpu_that_is_held_down_to_avx2_has_none():
    """The variable that oneDNN obeys: how an older CPU is tried out on a newer one."""
    program = "from smt_dist.models.cpu_products import find_bf16_instructions as f; print(f()[0])"
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split()[-1] == "False"


@pytest.mark.parametrize(
    ("wanted", "device", "dtype", "cpu_info", "expected"),
    [
        (None, "cpu", torch.bfloat16, AVX2, True),
        (None, "cpu", torch.bfloat16, CPUS[2][0], False),
        (None, "cpu", torch.float32, AVX2, False),
        (None, "cuda", torch.bfloat16, AVX2, False),
        (True, "cpu", torch.bfloat16, CPUS[2][0], True),
        (False, "cpu", torch.bfloat16, AVX2, False),
    ],
)
def test_choice_is_the_programs_unless_it_is_said(this_cpu, wanted, device, dtype, cpu_info, expected):
    this_cpu(cpu_info)
    assert isinstance(fp32_products(wanted, device, dtype), SinglePrecisionProducts if expected else nullcontext)


@pytest.mark.parametrize(
    ("wanted", "cpu_info", "line"),
    [
        (None, AVX2, "multiplied in fp32: the CPU has no bf16 instructions"),
        (None, CPUS[2][0], "multiplied in bf16: the CPU has bf16 instructions"),
        (True, AVX2, "multiplied in fp32: --cpu_fp32_products"),
        (False, AVX2, "multiplied in bf16: --cpu_fp32_products"),
    ],
)
def test_choice_and_its_reason_are_logged_once(this_cpu, caplog, wanted, cpu_info, line):
    this_cpu(cpu_info)
    with caplog.at_level(logging.INFO, "smt_dist"):
        fp32_products(wanted, "cpu", torch.bfloat16)
        fp32_products(None, "cpu", torch.float32)  # nothing to choose, nothing to say
    (said,) = caplog.messages
    assert line in said


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """One entry for each product in fp32."""
    made: list[int] = []
    monkeypatch.setattr(cpu_products, "product", lambda *a, **k: made.append(1) or product(*a, **k))
    return made


@pytest.mark.parametrize("given", [None, "false"])
@pytest.mark.parametrize("program", ["train.py", "select_blocks.py", "evaluate_model.py"])
def test_every_program_that_computes_chooses(this_cpu, calls, run, train, folder, tmp_path, program, given):
    this_cpu(AVX2)
    flags = {"cpu_fp32_products": given}
    if program == "evaluate_model.py":
        own = {"eval_file": folder / "eval.json", "output": tmp_path / "scores.json", "max_new_tokens": 2}
        outcome = run(program, **own, **flags, model_name_or_path=folder / "model", dtype="bfloat16")
    else:
        output = {"output": tmp_path / "selection.json"} if program == "select_blocks.py" else {}
        outcome = train(program=program, **output, **flags, dtype="bfloat16")
    assert outcome.code == 0
    assert bool(calls) is (given is None)


def test_products_in_fp32_are_no_farther_from_the_truth():
    """Of a bf16 model's logits, from which answers are chosen; equal they aren't: they are rounded at other places."""
    model = make_model("llama", 0, vocab_size=264).eval()
    ids = torch.arange(3, 43).reshape(2, 20)
    with torch.inference_mode():
        model = model.bfloat16()
        truth = copy.deepcopy(model).float()(ids).logits
        plain = model(ids).logits.float()
        with SinglePrecisionProducts():
            ours = model(ids).logits.float()
    assert (ours - truth).norm() <= 1.05 * (plain - truth).norm()
    assert (ours - truth).norm() <= 0.02 * truth.norm()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 64)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_evaluation_multiplies_in_fp32_too(calls, mode, shape, has_bias):
    """inference_mode shows a linear layer whole: its product would stay in bf16."""
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(size, generator=generator).bfloat16() for size in ((32, 64), (32,), shape))
    added = [bias] if has_bias else []
    with mode(), SinglePrecisionProducts():
        ours = linear(x, weight, *added)
    assert calls
    truth = linear(x.float(), weight.float(), *(one.float() for one in added))
    assert torch.equal(ours, truth.bfloat16())


@pytest.mark.parametrize("given", [None, True, False])
def test_flag_is_kept_as_it_was_given(tmp_path, given):
    args = SMTTrainingArguments(output_dir=str(tmp_path), dtype="bfloat16", cpu_fp32_products=given)
    assert args.cpu_fp32_products is given


@pytest.mark.parametrize("script", ["quickstart.sh", "environment.sh"])
def test_scripts_leave_the_choice_to_the_programs(script):
    """A choice made in a script is missing wherever somebody starts the program without it."""
    text = (LAUNCH / script).read_text().lower()
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    for word in ("fp32", "--dtype", "cpuinfo", "lacks", "attn", "--device"):
        assert word not in code
