"""Hold and shard the base, score its blocks, and shard their optimizer state.

One file an engine; ``replicated.py`` is what ``ddp`` and ``fsdp2`` share.
"""

from __future__ import annotations

from typing import Literal, get_args

from smt_dist.engines.base import Engine, EngineOptions
from smt_dist.errors import SMTError

EngineName = Literal["ddp", "fsdp2", "deepspeed"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)


def make_engine(options: EngineOptions) -> Engine:
    """Make the engine that ``options`` name.

    Raises:
        SMTError: no such engine.
    """
    # Each imported where it is used: DeepSpeed alone takes seconds.
    if options.name == "ddp":
        from smt_dist.engines.ddp import DDPEngine

        return DDPEngine(options.reduce_dtype)
    if options.name == "fsdp2":
        from smt_dist.engines.fsdp2 import FSDP2Engine

        return FSDP2Engine(
            options.reduce_dtype,
            options.replicas,
            options.cpu_offload,
            options.units,
            options.prefetch,
            options.micro_batches,
        )
    if options.name == "deepspeed":
        from smt_dist.engines.deepspeed import DeepSpeedEngine

        assert options.deepspeed is not None
        return DeepSpeedEngine(options.deepspeed)
    raise SMTError(f"--engine: {options.name!r} is not one of {', '.join(ENGINES)}")
