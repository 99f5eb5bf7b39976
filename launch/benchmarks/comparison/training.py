"""One training run of any method: the same data order, steps, schedule and loss for all of them."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from comparison.methods import Method
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from smt_dist.config import SMTConfig, parse_model
from smt_dist.data.batches import TrainingData
from smt_dist.data.dataset import CausalLMCollator
from smt_dist.engines import make_engine
from smt_dist.sparse.targets import find_targets
from smt_dist.training.arguments import DTYPES, SMTTrainingArguments
from smt_dist.training.pipeline import attach_blocks, collect_and_select
from smt_dist.training.trainer import SMTTrainer

UNTIMED_STEPS = 2  # the first ones allocate
WARMUP_SHARE = 0.1  # of the steps: the learning rate rises
BETA2 = 0.95  # the SMT paper's; the other methods' runs are as short
RANKS_TO_ALPHA = 2  # LoRA's alpha a rank: delta = alpha / rank x B A, as LLM-Adapters has it


@dataclass
class RecordingCollator:
    """A collator that hashes the token ids of the first batches, in order.

    Attributes:
        collator: makes the batches.
        batches: how many to hash; more may be made (prefetching).
    """

    collator: CausalLMCollator
    batches: int
    seen: int = 0
    _hash: Any = field(default_factory=hashlib.sha256)

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.collator(examples)
        if self.seen < self.batches:
            self._hash.update(json.dumps(batch["input_ids"].tolist()).encode())
            self.seen += 1
        return batch

    @property
    def digest(self) -> str:
        """Of the batches so far."""
        return self._hash.hexdigest()


class StepTimer(TrainerCallback):
    """Seconds of each optimizer step, without the loading of its batch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)

    def median(self) -> float:
        """Of all but the first steps."""
        return statistics.median(self.seconds[UNTIMED_STEPS:] or self.seconds)


@dataclass
class Trained:
    """A model with what a method trains, before and after.

    Attributes:
        trainer: of the run.
        trainable: parameters.
        selection_seconds: SMT's warm-up; 0 for others.
    """

    trainer: Trainer
    trainable: int
    selection_seconds: float = 0.0

    @property
    def met_non_finite_values(self) -> bool:
        """Whether SMT's trainer has met NaN or infinity; the others don't look."""
        return isinstance(self.trainer, SMTTrainer) and self.trainer.non_finite.skipped > 0

    def save(self, folder: Path) -> None:
        """The adapter, or the whole model."""
        model = self.trainer.model
        if isinstance(self.trainer, SMTTrainer):
            self.trainer.save_model(str(folder))
        elif isinstance(model, PreTrainedModel):
            model.save_pretrained(folder)
        else:  # PEFT's; the embeddings aren't trained
            model.save_pretrained(folder, save_embedding_layers=False)


def base_dtype(method: Method, dtype: str) -> torch.dtype:
    """Of the weights that are loaded to train: full fine-tuning's are its fp32 masters."""
    return torch.float32 if method.family == "full" else DTYPES[dtype]


def smt_config(request: dict[str, Any], score: str) -> SMTConfig:
    """The blocks of a request. Raises SMTError for a wrong value."""
    content = {
        "block_size": request["block_size"],
        "groups": [{"name": "targets", "target_modules": request["targets"], "blocks": request["amount"]}],
        "selection": {"score": score, "strategy": request["strategy"], "seed": request["seed"]},
        "warmup": {"steps": request["selection_steps"]},
    }
    return parse_model(SMTConfig, json.dumps(content), "the comparison's flags")


def prepare(
    method: Method, request: dict[str, Any], model: PreTrainedModel, data: datasets.Dataset, pad_token_id: int
) -> tuple[Trained, RecordingCollator, StepTimer]:
    """Attach what the method trains, and make its trainer.

    Raises:
        SMTError: the model doesn't have the targets, or not enough blocks.
    """
    collator = RecordingCollator(CausalLMCollator(pad_token_id), request["steps"])
    timer = StepTimer()
    common = {"train_dataset": data, "data_collator": collator, "callbacks": [timer]}
    if method.family == "smt":
        return _smt(method, request, model, common), collator, timer
    if method.family == "full":
        model.requires_grad_(True)
        trained: nn.Module = model
    else:
        trained = attach_adapter(method, request, model)
    # Over a bf16 base, full fine-tuning's fp32 masters compute in bf16.
    args = TrainingArguments(**_arguments(request), bf16=method.family == "full" and request["dtype"] == "bfloat16")
    trainer = Trainer(model=trained, args=args, **common)
    return Trained(trainer, _trainable(trained)), collator, timer


def attach_adapter(method: Method, request: dict[str, Any], model: PreTrainedModel) -> nn.Module:
    """PEFT's LoRA, DoRA or SHiRA on the modules that SMT would train, in fp32."""
    from peft import LoraConfig, ShiraConfig, get_peft_model

    group = {"name": "targets", "target_modules": request["targets"]}
    config = parse_model(SMTConfig, json.dumps({"groups": [group]}), "--targets")
    targets, rank = find_targets(model, config)["targets"], request["amount"]
    if method.family == "shira":
        return get_peft_model(model, ShiraConfig(r=rank, target_modules=targets, random_seed=request["seed"]))
    lora = LoraConfig(
        r=rank, lora_alpha=RANKS_TO_ALPHA * rank, target_modules=targets, lora_dropout=0.0,
        use_dora=method.family == "dora", task_type="CAUSAL_LM",
    )  # fmt: skip
    return get_peft_model(model, lora)


def _smt(method: Method, request: dict[str, Any], model: PreTrainedModel, common: dict[str, Any]) -> Trained:
    # Whole logits, as the other methods have them.
    args = SMTTrainingArguments(**_arguments(request), dtype=request["dtype"], loss_chunk_size=0)
    config = smt_config(request, str(method.score))
    start = time.perf_counter()
    warmup = TrainingData(common["train_dataset"], None, common["data_collator"].collator)
    engine = make_engine(args.engine_options)
    selection, _ = collect_and_select(model, warmup, config, args, engine)
    seconds = time.perf_counter() - start
    attach_blocks(model, selection, config, args)
    return Trained(SMTTrainer(model, args, engine=engine, **common), _trainable(model), seconds)


def _arguments(request: dict[str, Any]) -> dict[str, Any]:
    """What all methods share."""
    return {
        "output_dir": request["scratch"],
        "max_steps": request["steps"],
        "per_device_train_batch_size": request["batch_size"],
        "learning_rate": request["rate"],
        "lr_scheduler_type": "linear",
        "warmup_steps": round(WARMUP_SHARE * request["steps"]),
        "weight_decay": 0.0,
        "adam_beta2": BETA2,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "seed": request["seed"],
        # Else the order would depend on what a method has drawn before.
        "data_seed": request["seed"],
        "save_strategy": "no",
        "logging_strategy": "steps",
        "logging_steps": max(1, request["steps"] // 20),
        "report_to": [],
        "use_cpu": not torch.cuda.is_available(),
    }


def _trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
