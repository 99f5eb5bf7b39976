"""Things that go wrong on one rank only."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from unittest import mock

from damage import reseal

from smt_dist.distributed import barrier, get_rank
from smt_dist.errors import SMTError
from workers.runs import engine_arguments
from workers.training import fixed_data, make_trainer, release


def full_disk(folder: Path, model: str) -> dict[str, str]:
    """What each rank says when rank 0 can write one tensor only."""
    return {engine: _full_disk(folder / engine, model, engine) for engine in ("ddp", "zero2")}


def _full_disk(folder: Path, model: str, engine: str) -> str:
    def write_one(_model, _folder, deltas, card):  # noqa: ARG001
        next(iter(deltas))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with engine_arguments(engine, folder, max_steps=1) as args:
        trainer = make_trainer(model, args, fixed_data())
        trainer.train()
        with mock.patch("smt_dist.saving_trainer.write_adapter", write_one):
            try:
                trainer.save_model()
                said = "nothing"
            except SMTError as error:
                said = str(error)
        release(trainer)
    return said


def half_a_random_state(folder: Path, model: str) -> str:
    """What each rank says when rank 1's file is damaged."""
    with engine_arguments("ddp", folder / "out", max_steps=2, save_strategy="steps", save_steps=1) as args:
        make_trainer(model, args, fixed_data()).train()
    checkpoint = folder / "out" / "checkpoint-1"
    if get_rank() == 0:
        (checkpoint / "rng_state_1.json").write_text('{"python": [1]}')
        reseal(checkpoint)
    barrier()
    with engine_arguments("ddp", folder / "again", max_steps=2) as args:
        try:
            make_trainer(model, args, fixed_data()).train(resume_from_checkpoint=str(checkpoint))
        except SMTError as error:
            return str(error)
    return "nothing"
