"""Programs multiply in fp32 where the CPU has no bf16 instructions, and the user may say otherwise."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch.nn.functional import linear

from smt_dist.models import cpu_products
from smt_dist.models.cpu_products import SinglePrecisionProducts, fp32_products, lacks_bf16_instructions
from smt_dist.training.arguments import SMTTrainingArguments

AVX2 = "flags\t\t: fpu sse2 avx avx2 fma"
CPUS = [
    (AVX2, True),
    (f"{AVX2} avx512f avx512_bf16", False),
    (f"{AVX2} amx_bf16 amx_tile", False),
    ("Features\t: fp asimd sve i8mm bf16", False),
    ("Features\t: fp asimd", True),
    ("", False),  # not Linux: nothing is known
]


@pytest.mark.parametrize(("cpu_info", "lacks"), CPUS)
def test_what_linux_says_of_the_cpu_is_read(cpu_info, lacks):
    assert lacks_bf16_instructions(cpu_info) is lacks


@pytest.mark.parametrize(
    ("wanted", "device", "dtype", "cpu_info", "expected"),
    [
        (None, "cpu", torch.bfloat16, AVX2, True),
        (None, "cpu", torch.bfloat16, CPUS[1][0], False),
        (None, "cpu", torch.float32, AVX2, False),
        (None, "cuda", torch.bfloat16, AVX2, False),
        (True, "cpu", torch.bfloat16, CPUS[1][0], True),
        (False, "cpu", torch.bfloat16, AVX2, False),
    ],
)
def test_choice_is_the_programs_unless_it_is_said(monkeypatch, tmp_path, wanted, device, dtype, cpu_info, expected):
    (tmp_path / "cpuinfo").write_text(cpu_info)
    monkeypatch.setattr(cpu_products, "CPU_INFO", tmp_path / "cpuinfo")
    assert isinstance(fp32_products(wanted, device, dtype), SinglePrecisionProducts if expected else nullcontext)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 64)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_evaluation_multiplies_in_fp32_too(monkeypatch, mode, shape, has_bias):
    """inference_mode shows a linear layer whole: its product would stay in bf16."""
    calls = []
    monkeypatch.setattr(cpu_products, "product", lambda *a, **k: calls.append(1) or product(*a, **k))
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(size, generator=generator).bfloat16() for size in ((32, 64), (32,), shape))
    added = [bias] if has_bias else []
    with mode(), SinglePrecisionProducts():
        ours = linear(x, weight, *added)
    assert calls
    truth = linear(x.float(), weight.float(), *(one.float() for one in added))
    assert torch.equal(ours, truth.bfloat16())


product = cpu_products.product


@pytest.mark.parametrize("given", [None, True, False])
def test_flag_is_kept_as_it_was_given(tmp_path, given):
    args = SMTTrainingArguments(output_dir=str(tmp_path), dtype="bfloat16", cpu_fp32_products=given)
    assert args.cpu_fp32_products is given
