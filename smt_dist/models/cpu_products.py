"""Multiply bf16 matrices in fp32, piece by piece, on CPUs without bf16 instructions.

On such CPUs torch multiplies bf16 element by element: products with a weight that isn't transposed, which every
backward needs, take 100 times as long as in fp32. Converting a whole weight would need twice its memory, so it is
converted in pieces.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

logger = logging.getLogger(__name__)

CPU_INFO = Path("/proc/cpuinfo")

# Elements of a weight that are converted at once: 8 MiB in fp32, which fits in a core's cache.
PIECE = 2**21
_COMPOSITE = (torch.ops.aten.linear.default, torch.ops.aten.matmul.default)


def find_bf16_instructions(cpu_info: str | None = None) -> tuple[bool, str]:
    """Find out whether torch multiplies bf16 with this CPU's own instructions.

    Args:
        cpu_info: text of /proc/cpuinfo (x86: ``avx512_bf16``, ``amx_bf16``; ARM: ``bf16``); None: this machine's.

    Returns:
        The answer, and its reason for a log line.
    """
    if not _onednn_has_bf16():
        return False, "torch has no bf16 kernels for this CPU"
    if cpu_info is None:
        cpu_info = CPU_INFO.read_text() if CPU_INFO.exists() else ""
    if not cpu_info:
        return True, "torch has bf16 kernels for this CPU, and there is no /proc/cpuinfo"
    if "bf16" in cpu_info:
        return True, "the CPU has bf16 instructions"
    return False, "the CPU has no bf16 instructions"


def _onednn_has_bf16() -> bool:
    """Return whether oneDNN has bf16 kernels, by torch's own check before a product.

    oneDNN obeys ``ONEDNN_MAX_CPU_ISA``; /proc/cpuinfo doesn't show that.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def fp32_products(wanted: bool | None, device: str, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Return the context for a program's matrix products, and log the choice where it matters.

    Args:
        wanted: whether to multiply bf16 matrices in fp32; None: if that is faster.
        device: on any other than ``"cpu"`` nothing is changed.
        dtype: of the weights.
    """
    if device != "cpu" or (wanted is None and dtype != torch.bfloat16):
        return nullcontext()
    why = "--cpu_fp32_products"
    if wanted is None:
        has_instructions, why = find_bf16_instructions()
        wanted = not has_instructions
    logger.info("bf16 matrices are multiplied in %s: %s", "fp32" if wanted else "bf16", why)
    return SinglePrecisionProducts() if wanted else nullcontext()


class SinglePrecisionProducts(TorchDispatchMode):
    """Compute products of bf16 matrices on the CPU in fp32, rounded to bf16 once.

    This holds for forwards and backwards inside the context. No other operation is changed.
    """

    def __init__(self) -> None:
        super().__init__()
        # One buffer for all pieces: allocating it each time costs more than the product itself.
        self._piece = torch.empty(PIECE)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        # A DTensor decomposes its operation first; its local operations come back here.
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if func in _COMPOSITE and _is_ours(*args[:2]):
            with self:  # these arrive whole in torch.inference_mode, decomposed in no_grad
                return func.decompose(*args)
        if func is torch.ops.aten.mm.default and _is_ours(*args):
            return product(*args, self._piece)
        if func is torch.ops.aten.addmm.default and _is_ours(*args[1:]) and not kwargs:
            return product(*args[1:], self._piece, bias=args[0])
        if func is torch.ops.aten.addmm_.default and _is_ours(*args[1:]) and not kwargs:
            return args[0].copy_(product(*args[1:], self._piece, bias=args[0]))
        return func(*args, **(kwargs or {}))


def _is_ours(*matrices: torch.Tensor) -> bool:
    return all(matrix.dtype == torch.bfloat16 and matrix.device.type == "cpu" for matrix in matrices)


def product(
    left: torch.Tensor, right: torch.Tensor, piece: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute ``left @ right + bias`` of bf16 matrices in fp32, rounded to bf16 once.

    Args:
        left: ``[m, k]``.
        right: ``[k, n]``.
        piece: a flat fp32 buffer for the converted parts of ``right``.
        bias: added before rounding; None: none.

    Returns:
        bf16 ``[m, n]``.
    """
    total = _sum(left.float(), right, piece)
    return (total if bias is None else total.add_(bias)).bfloat16()


def _sum(wide: torch.Tensor, right: torch.Tensor, piece: torch.Tensor) -> torch.Tensor:
    lines = right.t() if right.stride(0) == 1 else right  # contiguous in memory
    step = len(piece) // lines.shape[1]
    if len(lines) <= step or step == 0:
        return wide @ right.float()
    total = wide.new_zeros(wide.shape[0], right.shape[1])
    for first in range(0, len(lines), step):
        part = lines[first : first + step]
        converted = piece[: part.numel()].view_as(part).copy_(part)
        if lines is right:
            total.addmm_(wide[:, first : first + step], converted)
        else:  # a transposed weight: its parts are columns of the result
            total[:, first : first + step] = wide @ converted.t()
    return total
