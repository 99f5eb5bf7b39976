"""What all workers share: arguments for an engine, a model in its hands, and the data."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from tiny_models import make_rows
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, set_seed
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from smt_dist.data.batches import TrainingData
from smt_dist.data.dataset import CausalLMCollator
from smt_dist.distributed import get_world_size
from smt_dist.engines import make_engine
from smt_dist.training.arguments import SMTTrainingArguments

# Nothing is kept gathered and nothing fetched early: every forward and backward gathers anew, as in a large model.
REGATHER = {
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 0,
    "stage3_param_persistence_threshold": 0,
}
GLOBAL_BATCH = 8


def engine_flags(engine: str) -> dict[str, Any]:
    """The flags for ``ddp``, ``fsdp2``, ``hsdp`` (two replicas), ``zero1``, ``zero2`` or ``zero3``."""
    if engine.startswith("zero"):
        stage = int(engine.removeprefix("zero"))
        return {"deepspeed": {"zero_optimization": {"stage": stage, **(REGATHER if stage == 3 else {})}}}
    return {"engine": "fsdp2", "dp_replicate_size": 2} if engine == "hsdp" else {"engine": engine}


def shard_group(engine: str, world_size: int) -> int:
    """The number of ranks that hold one copy of the base together."""
    return {"fsdp2": world_size, "zero3": world_size, "hsdp": world_size // 2}.get(engine, 1)


@contextmanager
def engine_arguments(
    engine: str, output: Path, accumulation: int = 1, **options: Any
) -> Iterator[SMTTrainingArguments]:
    """SMTTrainingArguments for ``engine``; the libraries' global state is as new before and after.

    The global batch is the same for every world size and accumulation.
    """
    environment = dict(os.environ)
    defaults = {
        "dtype": "float32",
        "per_device_train_batch_size": GLOBAL_BATCH // get_world_size() // accumulation,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": accumulation,
        "disable_tqdm": True,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "seed": 0,
    }
    try:
        args = SMTTrainingArguments(output_dir=str(output), **engine_flags(engine), **(defaults | options))
        args.set_up_process_group()
        set_seed(args.seed)
        yield args
    finally:
        del args
        unset_hf_deepspeed_config()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        os.environ.clear()
        os.environ.update(environment)
        gc.collect()


def load_model(folder: str | Path, args: SMTTrainingArguments) -> PreTrainedModel:
    """As ``launch/train.py`` loads it: under ZeRO-3 and fsdp2 each rank keeps its part only."""
    engine, config = make_engine(args.engine_options), AutoConfig.from_pretrained(folder)
    options = engine.load_options(config, args.base_dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=args.base_dtype, **options)
    engine.prepare_base(model)
    return model


def training_data(rows: datasets.Dataset, evaluation: datasets.Dataset | None = None) -> TrainingData:
    """Rows as the programs hold them."""
    return TrainingData(train=rows, evaluation=evaluation, collator=CausalLMCollator(pad_token_id=0))


def standard_data() -> TrainingData:
    """40 rows; with 8 rows a step and 1 to 4 ranks, some ranks get micro-batches without any label."""
    return training_data(make_rows(40, unlabelled=(*range(8), 11, 17, 18, 25, 30, 31, 36)), make_rows(8, seed=9))


def elements_held(model: torch.nn.Module) -> int:
    """Elements of the base that this rank holds between steps."""

    def held(parameter: torch.Tensor) -> int:
        if isinstance(parameter, DTensor):
            return parameter.to_local().numel()
        return parameter.ds_tensor.numel() if hasattr(parameter, "ds_tensor") else parameter.numel()

    return sum(held(parameter) for name, parameter in model.named_parameters() if not name.endswith(".delta"))


def wrapped_by_accelerate_fsdp(_folder: Path) -> str:
    """What accelerate makes of a model when its FSDP plugin is asked for, without a GPU."""
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    model = Accelerator(cpu=True).prepare(torch.nn.Linear(2, 2))
    return type(model).__name__
