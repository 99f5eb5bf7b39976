"""Define ``Request``, which can be checked without building anything."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from smt_dist.config import GRADIENT_SCORES, SALIENCY, SMTConfig
from smt_dist.engines.fsdp2_units import UNITS
from smt_dist.errors import SMTError, first_line
from smt_dist.models.chunked_loss import CHUNK
from smt_dist.sparse.blocks import BlockSelection
from smt_dist.sparse.forms import Form
from smt_dist.training.arguments import DTYPES

ENGINES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
METHODS = ("smt", "full", "lora")
BACKENDS = ("nccl", "gloo")


@dataclass(frozen=True)
class Request:
    """Describe one run to plan.

    Attributes:
        model: the model's config.
        smt: the SMT config; LoRA takes its targets and its number of trained parameters.
        engine: one of :data:`ENGINES`.
        world_size: ranks.
        replicas: of the sharded base, ``fsdp2`` only (HSDP).
        method: one of :data:`METHODS`.
        checkpointing: recompute activations in the backward.
        batch: rows a rank in a micro-batch.
        sequence: tokens a row.
        dtype: ``bfloat16`` or ``float32``: of the base, or, for ``full``, in which it computes.
        selection: chosen blocks; None spreads them evenly.
        ranks_per_node: for host memory.
        device_memory: bytes a device has; None leaves open what fits.
        zero: the ``zero_optimization`` section of a DeepSpeed JSON.
        units: ``smt`` under ``fsdp2``: what is gathered at once.
        prefetch: ``smt`` under ``fsdp2``: gather the next unit of the backward while one computes.
        loss_chunk: ``smt``: vocabulary entries for which logits exist at once; 0: whole logits.
        accumulation: micro-batches a step; the last one is planned, which finds the sums of those before.
        masters: ``full``: weights are fp32 and compute in ``dtype``; False: they, their gradients and Adam's moments
            are in ``dtype``, as in a warm-up of mode ``full_ft``.
        backend: of the collectives, one of :data:`BACKENDS`: ``gloo`` copies once more what it gathers, and what it
            reduces and scatters.

    Raises:
        SMTError: a value is out of range, or the mesh can't be built; names the flag.
    """

    model: PreTrainedConfig
    smt: SMTConfig = field(default_factory=SMTConfig)
    engine: str = "ddp"
    world_size: int = 1
    replicas: int = 1
    method: str = "smt"
    checkpointing: bool = False
    batch: int = 1
    sequence: int = 1024
    dtype: str = "bfloat16"
    selection: BlockSelection | None = None
    ranks_per_node: int = 8
    device_memory: int | None = None
    zero: dict[str, Any] = field(default_factory=dict)
    units: str = "auto"
    prefetch: bool = True
    loss_chunk: int = CHUNK
    accumulation: int = 1
    masters: bool = True
    backend: str = "nccl"

    def __post_init__(self) -> None:
        for flag, value, known in (
            ("engine", self.engine, ENGINES),
            ("method", self.method, METHODS),
            ("dtype", self.dtype, tuple(DTYPES)),
            ("fsdp2_units", self.units, UNITS),
            ("backend", self.backend, BACKENDS),
        ):
            if value not in known:
                raise SMTError(f"--{flag}: {value!r} is not one of {', '.join(known)}")
        counts = {
            "world_size": self.world_size,
            "dp_replicate_size": self.replicas,
            "per_device_train_batch_size": self.batch,
            "gradient_accumulation_steps": self.accumulation,
            "max_seq_length": self.sequence,
            "gpus_per_node": self.ranks_per_node,
        }
        for flag, count in counts.items():
            if count < 1:
                raise SMTError(f"--{flag}: must be at least 1, not {count}")
        if self.sequence < 2:
            raise SMTError("--max_seq_length: must be at least 2: the first token predicts the second")
        if self.replicas > 1 and self.engine != "fsdp2":
            raise SMTError(f"--dp_replicate_size belongs to --engine fsdp2, not to {self.engine}")
        if self.world_size % self.replicas:
            raise SMTError(f"--world_size: {self.world_size} ranks can't be cut into {self.replicas} equal replicas")
        limit = getattr(self.model, "max_position_embeddings", None)
        if isinstance(limit, int) and self.sequence > limit and self.model.model_type in ("gpt2", "opt"):
            raise SMTError(f"--max_seq_length: the model has positions for {limit} tokens, not {self.sequence}")

    @property
    def shards(self) -> int:
        """Return the number of ranks that share one copy of the base."""
        if self.engine == "fsdp2":
            return self.world_size // self.replicas
        return self.world_size if self.engine == "zero3" else 1

    @property
    def score(self) -> str:
        """Return the gradient score whose warm-up is planned.

        Where the config's isn't one, one that accumulates as it does.

        What ``grad_x_weight`` and a function of the user's read at the end, a whole weight or gradient, isn't in it.
        """
        chosen = self.smt.selection
        if chosen.score in GRADIENT_SCORES:
            return chosen.score
        return "abs_mean" if chosen.is_custom or chosen.score == SALIENCY else "mean_abs"

    @property
    def layers(self) -> int:
        """Return the model's depth."""
        return int(text_config(self.model).num_hidden_layers)

    @property
    def form(self) -> Form:
        """Return the form of the blocks wherever a weight allows it."""
        return "additive" if self.engine.startswith("zero") or self.smt.form == "additive" else "in_place"

    @property
    def base_dtype(self) -> torch.dtype:
        """Return the dtype in which the base is stored.

        Full fine-tuning keeps fp32 weights, except that DeepSpeed splits them.
        """
        if self.method == "full" and self.masters and not self.engine.startswith("zero"):
            return torch.float32
        return DTYPES[self.dtype]

    def at_depth(self, layers: int) -> PreTrainedConfig:
        """Return the model's config with another number of layers."""
        config = copy.deepcopy(self.model)
        text = text_config(config)
        text.num_hidden_layers = layers
        if getattr(text, "layer_types", None):
            text.layer_types = list(text_config(self.model).layer_types)[:layers]
        return config


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the part of a config that describes the decoder."""
    return config.get_text_config(decoder=True)


def read_model_config(path: str, flag: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Read a model's config from a file, a model folder or a hub name, without weights.

    Raises:
        SMTError: it can't be read, or isn't a causal language model's.
    """
    if flag == "--model_config" and not Path(path).exists():
        raise SMTError(f"{flag}: {path}: no such file")
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise SMTError(f"{flag}: {path}: no model's config.json ({first_line(error)})") from None
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    # An encoder (BERT) could be made a causal model, but isn't one.
    other = config.architectures and known is not None and known.__name__ not in config.architectures
    if known is None or (other and not getattr(config, "is_decoder", False)) or config.is_encoder_decoder:
        raise SMTError(f"{flag}: {path}: {config.model_type!r} is not a causal language model")
    if not isinstance(getattr(text_config(config), "num_hidden_layers", None), int):
        raise SMTError(f"{flag}: {path}: the config doesn't say how many layers the model has")
    return config
