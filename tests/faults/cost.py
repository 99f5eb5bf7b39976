"""What the guards cost: python tests/faults/cost.py

Two gloo ranks train a Llama of 14M parameters in fp32, 4 x 256 tokens each, with 3 % of its parameters in blocks.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness import launch
from tiny_models import save_tiny_llama

SHAPE = {"hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 6, "num_key_value_heads": 6}


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        model = save_tiny_llama(folder / "model", layers=8, max_position_embeddings=256, **SHAPE)
        for rank, found in enumerate(launch("workers.guards:cost", 2, folder, model=str(model))):
            step = found["step"]
            print(
                f"rank {rank}: the checks of a step take {found['before_step'] / step:.4f} of it, those before a save "
                f"{found['check_before_save'] / step:.3f} of a step (median step {step:.3f} s)"
            )


if __name__ == "__main__":
    main()
