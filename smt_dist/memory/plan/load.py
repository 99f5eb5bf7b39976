"""Calculate the peak of the load, and host memory per node.

Read from how transformers 5.23 loads for each engine, not traced.
"""

from __future__ import annotations

from smt_dist.memory.plan.categories import GIB, Memory
from smt_dist.memory.plan.request import Request
from smt_dist.memory.plan.spread import Shape

# Python, torch, transformers and DeepSpeed in one process.
HOST_PROCESS = GIB


def load_peak(request: Request, shape: Shape) -> Memory:
    """Return a device's peak while the base is read.

    It holds this rank's part, and one whole weight where parts are cut from whole ones.
    """
    width = request.base_dtype.itemsize
    held = width * sum(-(-size // request.shards) for size in shape.sizes)
    whole = width * shape.largest if request.shards > 1 else 0
    return Memory(base_weights=held, temporary=whole)


def host_bytes_per_node(request: Request, shape: Shape) -> int:
    """Return host memory of the fullest node while loading, without the files' page cache.

    ``ddp`` and ZeRO-1/2 read the whole base in each process before it goes to the device; ZeRO-3's rank 0 reads all
    of it and the others none; under ``fsdp2`` each process reads its slices, weight by weight.
    """
    ranks = min(request.world_size, request.ranks_per_node)
    width = request.base_dtype.itemsize
    if request.engine == "fsdp2" and request.shards > 1:
        weights = ranks * width * shape.largest
    elif request.engine == "zero3":
        weights = width * shape.parameters
    else:
        weights = ranks * width * shape.parameters
    return weights + ranks * HOST_PROCESS
