"""What the tests of the programs share: files that are right, flags, and what a program left behind."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import NamedTuple

LAUNCH = Path(__file__).parents[1] / "launch"
CONFIG = {
    "block_size": 8,
    "groups": [{"name": "attention", "target_modules": "attention", "blocks": 6}],
    "warmup": {"steps": 2},
}
ROWS = [{"instruction": f"add one to {n}", "input": "", "output": str(n + 1)} for n in range(16)]
QUESTIONS = [{"instruction": f"add one to {n}", "input": "", "answer": str(n + 1)} for n in range(4)]
# fp32 and no shuffle of the learning rate: what is compared here must not depend on rounding.
TRAINING = {
    "dtype": "float32", "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
    "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
    "selection_report": False,  # seconds each; tests of reports ask for them
}  # fmt: skip


class Outcome(NamedTuple):
    """What a program left behind."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one error line. There must be exactly one, at the end, and no traceback."""
        assert self.code == 2, self.err
        assert "Traceback" not in self.err
        lines = [line for line in self.err.splitlines() if ": error: " in line]
        assert len(lines) == 1, self.err
        assert self.err.rstrip().endswith(lines[0]), "the error line isn't the last one"
        return lines[0]


def train_flags(folder: Path, output: Path) -> dict[str, object]:
    files = {"model_name_or_path": folder / "model", "train_file": folder / "train.json"}
    return {**files, "smt_config": folder / "smt.json", "output_dir": output, **TRAINING}


def command_line(flags: dict[str, object]) -> list[str]:
    return [part for name, value in flags.items() if value is not None for part in (f"--{name}", str(value))]


def write_job_files(folder: Path) -> Path:
    """A tiny model, rows and an SMT config, where they aren't there yet. Returns ``folder``."""
    from architectures import make_model
    from tiny_tokenizer import make_tokenizer

    if not (folder / "smt.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        make_model("llama", 0, vocab_size=264, max_position_embeddings=1024).save_pretrained(folder / "model")
        make_tokenizer().save_pretrained(folder / "model")
        write_json(folder / "train.json", ROWS)
        write_json(folder / "smt.json", CONFIG)
    return folder


def load_program(name: str):
    spec = importlib.util.spec_from_file_location(f"launch_{Path(name).stem}", LAUNCH / name)
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def logged_losses(checkpoint: Path) -> list[float]:
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def write_json(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


def write_config(tmp_path: Path, **changes: object) -> Path:
    return write_json(tmp_path / "changed.json", {**CONFIG, **changes})
