"""Import everything once, and fork the ranks of one job after the other.

A job then costs its own seconds, not those of the imports. Jobs come as JSON lines on stdin; for each, one line of
results goes to stdout. The parent ends with its stdin, and takes the ranks of an unfinished job along.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import sys
from collections.abc import Callable

from forks.job import Job
from forks.waiting import Watch


def serve() -> Callable[[], None] | None:
    """Run jobs until stdin closes. In a forked rank: return what it has to do."""
    # Results have the pipe for themselves: libraries log to stdout too.
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    _prepare()
    print("ready", file=results)
    parent = os.getpid()
    for line in sys.stdin:
        job = Job.from_json(json.loads(line))
        processes = {}
        for rank in job.environments:
            pid = os.fork()
            if pid == 0:
                os.close(results.fileno())
                return lambda job=job, rank=rank: _become(job, rank, parent)
            processes[rank] = pid
        print(json.dumps(Watch(job, processes).wait()), file=results)
    return None


def _become(job: Job, rank: int, parent: int) -> None:
    from forks.rank import become  # torch and all: not before the streams are as they shall be

    become(job, rank, parent)


def _prepare() -> None:
    """Import whatever a rank would, so that forks share it.

    None of it may start a thread or a process group.
    """
    import datasets  # noqa: F401
    import deepspeed.runtime.engine  # noqa: F401
    import torch._dynamo
    import transformers.models.llama.modeling_llama
    import transformers.trainer  # noqa: F401
    import workers
    from compiled_ops import BUILD
    from programs import load_program

    import forks.rank  # noqa: F401
    import smt_dist.engines.ddp
    import smt_dist.engines.deepspeed
    import smt_dist.engines.fsdp2
    import smt_dist.training.trainer  # noqa: F401

    torch.set_num_threads(1)
    for module in pkgutil.iter_modules(workers.__path__):
        importlib.import_module(f"workers.{module.name}")
    load_program("train.py")
    exec(BUILD)  # loaded once, not in each fork: its own check of what is compiled takes seconds
    # A collection in a fork would copy all memory that it shares.
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    work = serve()
    if work is not None:
        work()
