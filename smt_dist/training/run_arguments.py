"""Define ``RunArguments``: what to tune, and on what."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from smt_dist.data.prompts import PromptStyle
from smt_dist.errors import SMTError
from smt_dist.training.choices import check_choices


@dataclass
class RunArguments:
    """Hold what to tune, and on what."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "model folder or hub name"})
    # A mapping of a recipe arrives as JSON text.
    smt_config: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "SMT config: a JSON file, or JSON itself; without it: q, k, v; blocks of 256; 0.84 %% of parameters"
        },
    )
    train_file: str | None = field(
        default=None, metadata={"help": "JSON or JSONL rows: instruction/input/output, messages, or text"}
    )
    eval_file: str | None = field(default=None, metadata={"help": "rows for the evaluation loss, same formats"})
    dataset_name: str | None = field(default=None, metadata={"help": "hub data set, instead of --train_file"})
    dataset_config: str | None = field(default=None, metadata={"help": "its configuration"})
    max_seq_length: int = field(default=1024, metadata={"help": "tokens; longer rows are cut, and counted"})
    packing: bool = field(default=False, metadata={"help": "put whole rows together up to --max_seq_length"})
    prompt_style: PromptStyle = field(
        default="plain", metadata={"help": "instruction rows: plain (Alpaca template) or chat (chat template)"}
    )
    selection: str | None = field(default=None, metadata={"help": "selection file: use it, run no warm-up"})
    adapter: str | None = field(default=None, metadata={"help": "adapter folder: go on training its blocks"})
    gguf_file: str | None = field(
        default=None, metadata={"help": "GGUF file (in the model folder, or a path): dequantised once and cached"}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "such as sdpa or flash_attention_2"})
    selection_report: bool = field(
        default=True,
        metadata={
            "help": "write selection.html and PNG files (needs plotly and matplotlib); --picture is its former name"
        },
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that comes with the model"})
    profile_memory: str | None = field(
        default=None,
        metadata={"help": "folder: record each rank's memory in every phase, and write it beside its plan (train.py)"},
    )
    profile_memory_steps: int = field(
        default=2, metadata={"help": "first steps of the warm-up and of training to record change by change"}
    )

    def check(self) -> None:
        """Raise SMTError for what can be seen without reading anything."""
        if self.model_name_or_path is None and self.gguf_file is None:
            raise SMTError("--model_name_or_path is missing (or --gguf_file)")
        check_choices(self)
        if self.train_file is not None and self.dataset_name is not None:
            raise SMTError("--train_file together with --dataset_name: give one of them")
        if self.profile_memory_steps < 1:
            raise SMTError(f"--profile_memory_steps: must be at least 1, not {self.profile_memory_steps}")
        if self.selection and self.adapter:
            raise SMTError("--selection together with --adapter: the adapter brings its own selection")

    def check_data(self) -> None:
        """Raise SMTError where there is nothing to read."""
        if self.train_file is None and self.dataset_name is None:
            raise SMTError("--train_file is missing (or --dataset_name)")
