"""Small models run for real, beside their plans."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from memory_cell import measure_cell
from transformers import LlamaConfig

from smt_dist import SMTConfig
from smt_dist.memory.plan.request import Request

SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 4000,
}
SMT = {"block_size": 32, "groups": [{"fraction": 0.01}], "warmup": {"steps": 1}}


def small_request(**changes: Any) -> Request:
    """A request that the tests change in places."""
    smt = SMTConfig.model_validate(SMT | changes.pop("smt", {}))
    model = LlamaConfig(**(SHAPE | changes.pop("shape", {})))
    return Request(**({"model": model, "smt": smt, "batch": 4, "sequence": 128} | changes))


def measure(folder: Path, cells: list[dict[str, Any]]) -> list[dict[str, dict[str, int]]]:
    """Of each cell: phase -> bytes by category at this rank's peak."""
    found = []
    for cell in cells:
        peaks = measure_cell(small_request(**cell), str(folder / "trainer"))
        found.append({phase: memory.to_json() for phase, (_, memory) in peaks.items()})
    return found
