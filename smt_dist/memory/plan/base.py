"""Build a request's base as its engine shards it, from fake tensors or real ones."""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.initialization import no_tie_weights
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from smt_dist.distributed import is_distributed
from smt_dist.engines.fsdp2 import FSDP2Engine
from smt_dist.errors import SMTError
from smt_dist.memory.plan.request import Request
from smt_dist.models.chunked_loss import chunk_loss
from smt_dist.sparse.targets import find_targets
from smt_dist.training.arguments import DTYPES


class Sharding(NamedTuple):
    """Describe how ``fsdp2`` shards a base.

    Attributes:
        config: as transformers takes it.
        mesh: of the ranks.
    """

    config: DistributedConfig
    mesh: DeviceMesh


def make_sharding(request: Request, config: PreTrainedConfig) -> Sharding | None:
    """Make the request's sharding for the existing process group.

    A mesh has to be made outside of fake tensors.
    """
    if request.engine != "fsdp2" or not is_distributed():
        return None
    if request.method == "smt":
        wanted = _engine(request).load_options(config, request.base_dtype)["distributed_config"]
    else:  # as transformers has it
        wanted = DistributedConfig(
            fsdp_size=request.shards,
            dp_replicate_size=request.replicas,
            fsdp_mixed_precision=request.base_dtype != DTYPES[request.dtype],
        )
    wanted, _, mesh = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].prepare_distribute_model(wanted)
    return Sharding(wanted, mesh)


def build_base(request: Request, config: PreTrainedConfig, sharding: Sharding | None) -> PreTrainedModel:
    """Build the base with random (or fake) weights, ready for training.

    Raises:
        SMTError: the model can't checkpoint activations.
    """
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    # As transformers loads a model: weights are tied when they are sharded, not before.
    with nullcontext() if sharding is None else no_tie_weights():
        model = kind._from_config(config, dtype=request.base_dtype).train()
    if sharding is not None:
        model = kind.maybe_distribute_model(model, *sharding)
        model.tie_weights()
        if request.method == "smt":
            _engine(request).prepare_base(model)
    chunk_base_loss(model, request)
    if request.checkpointing:
        if not model.supports_gradient_checkpointing:
            raise SMTError(f"--gradient_checkpointing: {type(model).__name__} can't")
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model.disable_input_require_grads()  # as train.py does
    return model


def chunk_base_loss(model: PreTrainedModel, request: Request) -> bool:
    """Chunk the loss where ``train.py`` would, and say whether it is."""
    return request.method == "smt" and chunk_loss(model, request.loss_chunk, _modules_with_blocks(model, request))


def _modules_with_blocks(model: PreTrainedModel, request: Request) -> set[str]:
    chosen = request.selection.blocks if request.selection is not None else ()
    return {*chosen, *(name for names in find_targets(model, request.smt).values() for name in names)}


def _engine(request: Request) -> FSDP2Engine:
    return FSDP2Engine(
        torch.float32,
        request.replicas,
        units=request.units,
        prefetch=request.prefetch,
        micro_batches=request.accumulation,
    )
