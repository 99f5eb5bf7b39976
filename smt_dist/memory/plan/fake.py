"""Build a model of fake tensors on the fake process group.

It is sharded as transformers shards it on loading.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from smt_dist.errors import SMTError, first_line
from smt_dist.memory.plan.base import build_base, make_sharding
from smt_dist.memory.plan.request import Request


@contextmanager
def fake_group(ranks: int) -> Iterator[None]:
    """Create a process group of ``ranks`` in which this process is rank 0 and nothing is sent.

    None may exist yet.
    """
    if dist.is_initialized():
        raise RuntimeError("a plan needs a process without a process group")
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def fake_model(request: Request, layers: int) -> Iterator[PreTrainedModel]:
    """Yield a request's base, ``layers`` deep, as this rank holds it.

    Inside the context, fake tensors are on.

    Raises:
        SMTError: the model can't be built or sharded; names its class.
    """
    ranks = request.world_size
    config = request.at_depth(layers)
    config.use_cache = False
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with fake_group(ranks):
        fake = FakeTensorMode()
        try:
            sharding = make_sharding(request, config)
            with fake:
                model = build_base(request, config, sharding)
        except (ValueError, RuntimeError, TypeError, AttributeError) as error:
            if isinstance(error, SMTError):
                raise
            raise SMTError(f"{kind.__name__} can't be built on fake tensors ({first_line(error)})") from None
        with fake:
            yield model


def decoder_layers(model: nn.Module, layers: int) -> list[nn.Module]:
    """Return the layers that repeat, from the bottom."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return list(module)
    raise SMTError(f"{type(model).__name__} has no list of {layers} layers; its memory can't be planned")


def fake_batch(request: Request) -> dict[str, torch.Tensor]:
    """Return rows of the full length, all of whose tokens are labels."""
    tokens = torch.zeros(request.batch, request.sequence, dtype=torch.long)
    return {"input_ids": tokens, "labels": tokens.clone()}
