"""A model without memory: fake tensors on the fake process group, sharded as transformers shards it on loading."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from smt_dist.errors import SMTError, first_line
from smt_dist.memory.request import Request


@contextmanager
def fake_group(ranks: int) -> Iterator[None]:
    """A process group of ``ranks`` of which this process is rank 0; nothing is sent. Inside there must be none yet."""
    if dist.is_initialized():
        raise RuntimeError("a plan needs a process without a process group")
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def fake_model(request: Request, layers: int) -> Iterator[PreTrainedModel]:
    """The base of a request, ``layers`` deep, as this rank holds it; fake tensors are on inside.

    Raises:
        SMTError: the model can't be built or sharded; names its class.
    """
    ranks = request.world_size
    config = request.at_depth(layers)
    config.use_cache = False
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with fake_group(ranks):
        sharding, fake = None, FakeTensorMode()
        try:
            if request.engine == "fsdp2" and ranks > 1:
                sharding = DistributedConfig(
                    fsdp_size=request.shards,
                    dp_replicate_size=request.replicas,
                    fsdp_mixed_precision=request.method == "full" and request.dtype == "bfloat16",
                )
                # The mesh is made outside of fake tensors.
                sharding, _, mesh = kind.prepare_distribute_model(sharding)
            with fake:
                model = kind._from_config(config, dtype=request.base_dtype)
                if sharding is not None:
                    model = kind.maybe_distribute_model(model, sharding, mesh)
        except (ValueError, RuntimeError, TypeError, AttributeError) as error:
            raise SMTError(f"{kind.__name__} can't be built on fake tensors ({first_line(error)})") from None
        with fake:
            yield _prepared(model.train(), request)


def _prepared(model: PreTrainedModel, request: Request) -> PreTrainedModel:
    if request.checkpointing:
        if not model.supports_gradient_checkpointing:
            raise SMTError(f"--gradient_checkpointing: {type(model).__name__} can't")
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model.disable_input_require_grads()  # as train.py does
    return model


def decoder_layers(model: nn.Module, layers: int) -> list[nn.Module]:
    """The layers that repeat, from the bottom."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return list(module)
    raise SMTError(f"{type(model).__name__} has no list of {layers} layers; its memory can't be planned")


def fake_batch(request: Request) -> dict[str, torch.Tensor]:
    """Rows of the full length, all of whose tokens are labels."""
    tokens = torch.zeros(request.batch, request.sequence, dtype=torch.long)
    return {"input_ids": tokens, "labels": tokens.clone()}
