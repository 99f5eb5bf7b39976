"""Define ``SMTTrainingArguments``: TrainingArguments with an engine and a dtype.

Flags that can't be honoured are refused.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from datetime import timedelta
from inspect import signature
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from transformers import TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from smt_dist.data.batches import BatchOrder
from smt_dist.engines import EngineName
from smt_dist.engines.base import EngineOptions
from smt_dist.engines.elementwise import optimizer_class_by_name, parse_options, refuse_unless_elementwise
from smt_dist.engines.fsdp2_units import Units
from smt_dist.engines.process_group import initialize_process_group
from smt_dist.errors import SMTError, whole_message
from smt_dist.files import parse_json_object, read_text
from smt_dist.sparse.forms import Form
from smt_dist.training.choices import check_choices

DtypeName = Literal["float32", "bfloat16"]
DTYPES: dict[DtypeName, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Trainer features that would be ignored or go wrong with blocks, each with what to use instead.
_REFUSED: dict[str, str] = {
    "auto_find_batch_size": "it restarts training inside one process; plan the batch size instead",
    "torch_compile": "not tested with blocks",
    "torch_compile_backend": "not tested with blocks",
    "torch_compile_mode": "not tested with blocks",
    "use_liger_kernel": "not tested with blocks",
    "push_to_hub": "upload the adapter folder with `hf upload` when the run is done",
    "fp16": "needs a loss scaler; use --dtype bfloat16",
    "bf16": "autocast over an unchanged base; use --dtype bfloat16",
    "fp16_full_eval": "use --dtype",
    "bf16_full_eval": "use --dtype",
    "ddp_find_unused_parameters": "the model isn't wrapped in DDP, and may leave blocks unused",
    "ddp_bucket_cap_mb": "the blocks' gradients are reduced at once",
    "ddp_broadcast_buffers": "the model isn't wrapped in DDP",
    "ddp_static_graph": "the model isn't wrapped in DDP",
    "fsdp": "use --engine fsdp2, which shards the base as it is loaded",
    "parallelism_config": "only data parallelism is supported",
    "enable_jit_checkpoint": "not tested with blocks",
    "optim_target_modules": "belongs to optimizers that aren't supported",
    "label_smoothing_factor": "the warm-up scores the plain loss",
    "do_predict": "use smt-evaluate",
    "save_on_each_node": "checkpoints are written once, by rank 0",
}
# The least values of flags that would otherwise fail much later in Trainer, torch or the warm-up.
_LEAST: dict[str, int] = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "heartbeat_timeout": 0,
    "ddp_timeout": 1,
    "loss_chunk_size": 0,
}
# By Trainer's names; every other elementwise optimizer by its dotted name.
_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")
# Flags that mean something to one engine only.
_FSDP2_ONLY = {"dp_replicate_size": 1, "cpu_offload": False, "fsdp2_units": "auto", "fsdp2_prefetch": True}


@dataclass
class SMTTrainingArguments(TrainingArguments):
    """Extend ``transformers.TrainingArguments`` for SMT.

    Raises:
        SMTError: a flag that can't be honoured, by name.
    """

    # HfArgumentParser makes choices of a Literal, and shows them in --help.
    engine: Literal["auto", EngineName] = field(
        default="auto",
        metadata={"help": "who holds the base; auto: deepspeed where --deepspeed is given, else ddp"},
    )
    dp_replicate_size: int = field(
        default=1,
        metadata={
            "help": "fsdp2: replicas of the sharded base (HSDP), such as the number of nodes; divides the world size"
        },
    )
    cpu_offload: bool = field(
        default=False, metadata={"help": "fsdp2 on GPUs: keep the frozen base's shards in host memory"}
    )
    fsdp2_units: Units = field(
        default="auto",
        metadata={
            "help": "fsdp2: what is gathered at once. weight: less memory, more collectives; auto: weight where a "
            "layer has 256 MiB or more"
        },
    )
    fsdp2_prefetch: bool = field(
        default=True,
        metadata={"help": "fsdp2: gather the next layer or weight of the backward while one computes; no: less memory"},
    )
    loss_chunk_size: int = field(
        default=4096,
        metadata={
            "help": "vocabulary entries whose logits exist at once in the loss; 0: whole logits. Models that change "
            "their logits before the loss always have whole ones"
        },
    )
    cpu_fp32_products: bool | None = field(
        default=None,
        metadata={
            "help": "multiply bf16 matrices in fp32, a piece at a time; many times faster on CPUs without bf16 "
            "instructions (default: there only)"
        },
    )
    optim: str = field(
        default="adamw_torch_fused",
        metadata={
            "help": "adamw_torch, adamw_torch_fused, or an elementwise optimizer's dotted name, such as torch.optim.SGD"
        },
    )
    optim_args: str | None = field(
        default=None, metadata={"help": "options of an --optim with a dotted name: momentum=0.9, nesterov=True"}
    )
    reduce_dtype: DtypeName = field(
        default="float32",
        metadata={"help": "ddp, fsdp2: in which the blocks' gradients cross the network"},
    )
    dtype: DtypeName = field(
        default="bfloat16",
        metadata={"help": "dtype of the frozen base; blocks' masters are fp32"},
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "replace NaN losses in the logs by the last mean, which hides them"}
    )

    heartbeat_timeout: float = field(
        default=45.0,
        metadata={
            "help": "seconds of silence after which a rank counts as lost and the others end; 0: no heartbeat. (A rank "
            "that hangs but still has a heartbeat is noticed by collectives: --ddp_timeout, seconds)"
        },
    )

    # What --optim and --optim_args mean where it is a dotted name: class and keyword arguments. Not a flag.
    custom_optimizer: ClassVar[tuple[type[torch.optim.Optimizer], dict[str, Any]] | None] = None

    def __post_init__(self) -> None:
        if env_flag("ACCELERATE_USE_DEEPSPEED") and not self.deepspeed:
            self.deepspeed = accelerate_deepspeed_config()
        self._refuse_what_cannot_be_honoured()
        if self.engine == "auto":
            self.engine = "deepspeed" if self.deepspeed else "ddp"
        self._check_engine()
        self._check_fsdp2()
        self._check_optimizer()
        if not torch.cuda.is_available():
            self.use_cpu = True
        elif self.cpu_fp32_products and not self.use_cpu:
            raise SMTError("--cpu_fp32_products: this run computes on a GPU")
        self._meet_within_the_timeout()
        if self.activation_checkpointing or self.gradient_checkpointing:
            self._use_non_reentrant_checkpointing()
        if self.deepspeed:
            self.deepspeed = prepare_deepspeed_config(self.deepspeed, DTYPES[self.dtype])
            # Trainer compares this flag with the JSON; under DeepSpeed it switches no autocast on.
            self.bf16 = self.dtype == "bfloat16"
        try:
            super().__post_init__()
        except Exception as error:  # its checks and conversions can raise any exception
            raise SMTError(whole_message(error)) from None
        if self.deepspeed and self.hf_deepspeed_config.mismatches:
            raise SMTError(f"--deepspeed contradicts the flags: {self.hf_deepspeed_config.mismatches[0].lstrip('- ')}")

    @property
    def base_dtype(self) -> torch.dtype:
        """Return ``dtype`` as a torch dtype."""
        return DTYPES[self.dtype]

    @property
    def auto_form(self) -> Form:
        """Return what the config's form ``"auto"`` means."""
        # DeepSpeed shares rounded deltas: added to W0 they don't give the bits of the merge.
        return "additive" if self.engine == "deepspeed" else "in_place"

    def refuse_form(self, form: str) -> None:
        """Raise SMTError for a form of blocks that the engine can't have."""
        if form == "in_place" and self.auto_form != form:
            raise SMTError(
                "smt config form in_place: DeepSpeed shares deltas rounded to the base's dtype, from which a weight's "
                'merged values can\'t be made; use "auto", or --engine ddp or fsdp2'
            )

    @property
    def reduce_torch_dtype(self) -> torch.dtype:
        """Return ``reduce_dtype`` as a torch dtype."""
        return DTYPES[self.reduce_dtype]

    @property
    def batch_order(self) -> BatchOrder:
        """Return the order in which a warm-up's global steps take rows."""
        seed = self.seed if self.data_seed is None else self.data_seed
        return BatchOrder(self.per_device_train_batch_size, self.gradient_accumulation_steps, seed)

    @property
    def engine_options(self) -> EngineOptions:
        """Return what :func:`smt_dist.engines.make_engine` makes the engine from."""
        return EngineOptions(
            self.engine,
            self.reduce_torch_dtype,
            self.dp_replicate_size,
            self.cpu_offload,
            self.fsdp2_units,
            self.fsdp2_prefetch,
            self.gradient_accumulation_steps,
            self.filled_deepspeed_config(),
        )

    def set_up_process_group(self) -> None:
        """Create the process group before any model is built, with one GPU per process."""
        initialize_process_group(self.engine, self.ddp_timeout, lambda: self.device)
        if self.n_gpu > 1:  # one process that sees several GPUs: Trainer would use nn.DataParallel
            self._n_gpu = 1

    def filled_deepspeed_config(self) -> dict[str, Any] | None:
        """Return the DeepSpeed JSON with every ``"auto"`` that TrainingArguments can fill."""
        return self.hf_deepspeed_config.config if self.deepspeed else None

    def _refuse_what_cannot_be_honoured(self) -> None:
        for name, reason in _REFUSED.items():
            if getattr(self, name, None):
                raise SMTError(f"--{name} can't be used with SMT: {reason}")
        for name, least in _LEAST.items():
            if not least <= getattr(self, name) < math.inf:  # also refuses NaN
                raise SMTError(f"--{name}: {getattr(self, name)} is not at least {least} and finite")
        reporters = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        for reporter in reporters:
            if reporter not in ("none", "all", *INTEGRATION_TO_CALLBACK):
                known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
                raise SMTError(f"--report_to: {reporter!r} is not one of none, all, {known}")
        if not self.average_tokens_across_devices:
            raise SMTError("--average_tokens_across_devices false: SMT's warm-up and training count tokens globally")
        check_choices(self)

    def _check_engine(self) -> None:
        if self.engine != "deepspeed" and self.deepspeed:
            raise SMTError(f"--engine {self.engine} together with --deepspeed: give one of them")
        if env_flag("ACCELERATE_USE_FSDP"):
            raise SMTError(
                "accelerate's FSDP plugin can't be used with SMT (on CPU it silently runs DDP): launch with "
                "configs/accelerate/fsdp2.yaml and give --engine fsdp2"
            )
        if self.engine == "deepspeed" and not self.deepspeed:
            raise SMTError(
                "--engine deepspeed needs --deepspeed with a JSON file, such as configs/deepspeed/zero2.json"
            )

    def _check_fsdp2(self) -> None:
        for name, default in _FSDP2_ONLY.items():
            if self.engine != "fsdp2" and getattr(self, name) != default:
                raise SMTError(f"--{name} belongs to --engine fsdp2; the engine is {self.engine}")
        if self.engine == "deepspeed" and self.reduce_dtype != "float32":
            raise SMTError("--reduce_dtype: set communication_data_type in the DeepSpeed JSON instead")
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if self.dp_replicate_size < 1 or world_size % self.dp_replicate_size:
            raise SMTError(f"--dp_replicate_size: {self.dp_replicate_size} doesn't divide the {world_size} ranks")
        if self.cpu_offload and not torch.cuda.is_available():
            raise SMTError("--cpu_offload: there is no GPU, so the base lies in host memory already")
        if self.cpu_offload and world_size == 1:
            raise SMTError("--cpu_offload: one rank shards nothing, so nothing is offloaded; start more ranks")

    def _meet_within_the_timeout(self) -> None:
        """Create the process group with ``--ddp_timeout`` where TrainingArguments would ignore it.

        It does on CPU.
        """
        launched = "MASTER_ADDR" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
        if self.use_cpu and launched and not dist.is_initialized():
            dist.init_process_group(self.ddp_backend or "gloo", timeout=timedelta(seconds=self.ddp_timeout))

    def _check_optimizer(self) -> None:
        name = getattr(self.optim, "value", self.optim)
        if "." in name:
            options = {"lr": self.learning_rate, **parse_options(self.optim_args)}
            self.custom_optimizer = optimizer_class_by_name(name), options
            refuse_unless_elementwise(*self.custom_optimizer)  # now, not after the warm-up
            if self.weight_decay and "weight_decay" not in signature(self.custom_optimizer[0]).parameters:
                raise SMTError(f"--weight_decay: {name} has none")
            self.optim = _OPTIMIZERS[0]  # Trainer refuses names that it doesn't know
        elif name not in _OPTIMIZERS:
            raise SMTError(
                f"--optim: {name!r} is not supported with SMT; use {', '.join(_OPTIMIZERS)}, or the dotted name of an "
                "elementwise optimizer such as torch.optim.SGD"
            )
        elif self.optim_args:
            raise SMTError(f"--optim_args: {name} takes --adam_beta1, --adam_beta2 and --adam_epsilon instead")

    def _use_non_reentrant_checkpointing(self) -> None:
        # Re-entrant checkpointing gives no gradient where a layer's input is frozen (transformers#26221).
        given: dict[str, Any] = {}
        for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
            value = getattr(self, name)
            given.update(parse_json_object(value, f"--{name}") if isinstance(value, str) else value or {})
            setattr(self, name, None)
        if given.get("use_reentrant"):
            raise SMTError("gradient_checkpointing_kwargs: use_reentrant gives frozen layers no gradient; leave it out")
        self.gradient_checkpointing, self.activation_checkpointing = None, True
        self.activation_checkpointing_kwargs = {**given, "use_reentrant": False}


def env_flag(name: str) -> bool:
    """Return whether a launcher set this environment variable to yes."""
    return os.environ.get(name, "").lower() in ("1", "true", "yes", "on")


def accelerate_deepspeed_config() -> str:
    """Return the DeepSpeed JSON that ``accelerate launch`` was given.

    Raises:
        SMTError: there is none: accelerate would make one up from its own questionnaire.
    """
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path == "none":
        raise SMTError(
            "accelerate launch: its DeepSpeed config needs deepspeed_config_file (configs/accelerate/zero2.yaml)"
        )
    return path


def prepare_deepspeed_config(source: str | dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Complete a DeepSpeed config for SMT.

    It gets the base's dtype, fp32 gradients, and batch sizes from the flags.

    Args:
        source: a JSON file or its content, parsed or as text.
        dtype: of the base.

    Raises:
        SMTError: unreadable, or a section that would be ignored or contradicts the flags; names it.
    """
    if isinstance(source, str) and source.lstrip().startswith("{"):  # as transformers takes it
        source = parse_json_object(source, "--deepspeed")
    config, name = (
        (source, "--deepspeed") if isinstance(source, dict) else (parse_json_object(read_text(source), source), source)
    )
    config = json.loads(json.dumps(config))
    for section in ("bf16", "fp16", "zero_optimization", "data_types", "optimizer"):
        if not isinstance(config.get(section, {}), dict):
            raise SMTError(f"{name}: {section} must be an object, not {config[section]!r}")
    if config.get("bf16", {}).get("check_grad_overflow", True) is False:
        raise SMTError(f"{name}: bf16.check_grad_overflow false would train on NaN and infinity; remove it")
    if config.get("zero_optimization", {}).get("compute_grad_norm", True) is False:
        raise SMTError(f"{name}: zero_optimization.compute_grad_norm false would train on NaN and infinity; remove it")
    wants_bf16 = dtype == torch.bfloat16
    precision = config.setdefault("bf16", {"enabled": "auto"})
    if precision.get("enabled", "auto") not in ("auto", wants_bf16):
        raise SMTError(f'{name}: bf16.enabled is {precision["enabled"]} but --dtype is {str(dtype)[6:]}; use "auto"')
    precision["enabled"] = wants_bf16
    if config.get("fp16", {}).get("enabled", False) is True:
        raise SMTError(f"{name}: fp16 isn't supported with SMT; use bf16")
    if "scheduler" in config:
        raise SMTError(f"{name}: remove the 'scheduler' section; --lr_scheduler_type sets the schedule")
    zero = config.setdefault("zero_optimization", {"stage": 2})
    if zero.get("stage", 0) not in (1, 2, 3):
        raise SMTError(f"{name}: zero_optimization.stage must be 1, 2 or 3, not {zero.get('stage', 0)}")
    # A client AdamW with offloaded state is what DeepSpeed calls untested; it is torch's own.
    config.setdefault("zero_force_ds_cpu_optimizer", False)
    config.setdefault("zero_allow_untested_optimizer", True)
    if wants_bf16:
        config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
        config.setdefault("communication_data_type", "fp32")
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        config.setdefault(key, "auto")
    config.setdefault("gradient_clipping", "auto")
    return config
