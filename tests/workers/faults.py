"""Things that go wrong on one rank only."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Any
from unittest import mock

from damage import reseal
from transformers import AutoConfig, TrainerCallback

from smt_dist.checkpoint.rotation import last_checkpoint
from smt_dist.distributed import barrier, get_rank, raise_on_any_rank
from smt_dist.engines import make_engine
from smt_dist.errors import SMTError
from smt_dist.models.folder import check_model_folder, load_causal_lm
from workers.runs import engine_arguments
from workers.training import fixed_data, logged, make_trainer, release


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
        with mock.patch("smt_dist.training.saving.write_blocks_of", write_one):
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


def disk_that_fills(folder: Path, model: str, disk: str) -> dict[str, dict[str, object]]:
    """What each rank says and finds when the disk is full from the second checkpoint on, and after there is room."""
    return {engine: _disk_that_fills(folder, Path(disk) / engine, model, engine) for engine in ("ddp", "zero2")}


class _Filler(TrainerCallback):
    """Takes all that is left of the disk, but a page, once the first checkpoint is there."""

    def __init__(self, ballast: Path) -> None:
        self.ballast = ballast

    def on_save(self, _args: Any, _state: Any, _control: Any, **_: Any) -> None:
        if get_rank() == 0 and not self.ballast.exists():
            with contextlib.suppress(OSError), open(self.ballast, "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            os.truncate(self.ballast, self.ballast.stat().st_size - 4096)


def _disk_that_fills(folder: Path, output: Path, model: str, engine: str) -> dict[str, object]:
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    ballast = output.parent / "ballast"
    with engine_arguments(engine, output, **options) as args:
        trainer = make_trainer(model, args, fixed_data())
        trainer.add_callback(_Filler(ballast))
        try:
            trainer.train()
            said = "nothing"
        except SMTError as error:
            said = str(error)
        release(trainer)
    barrier()
    found = {
        "said": said,
        "left": sorted(path.name for path in output.iterdir()),
        "last": str(last_checkpoint(str(output))),
    }
    barrier()
    if get_rank() == 0:
        ballast.unlink()
    barrier()
    with engine_arguments(engine, output, **options) as args:
        trainer = make_trainer(model, args, fixed_data())
        trainer.train(resume_from_checkpoint="auto")
        found["resumed_to"] = trainer.state.global_step
        found["losses"] = logged(trainer)
        release(trainer)
    with engine_arguments(engine, folder / f"straight-{engine}", **options) as args:
        trainer = make_trainer(model, args, fixed_data())
        trainer.train()
        found["undisturbed"] = logged(trainer)
        release(trainer)
    return found


def bases_that_do_not_fit(folder: Path, models: list[str]) -> dict[str, str]:
    """What each rank says of bases whose config isn't that of their files: ``engine/model`` -> message."""
    return {f"{engine}/{model}": _load(folder, model, engine) for engine in ("zero3", "fsdp2") for model in models}


def _load(folder: Path, model: str, engine: str) -> str:
    with engine_arguments(engine, folder / engine, max_steps=1) as args:
        try:
            # Without this check ZeRO-3 hangs on another shape: rank 0 ends up in a collective of its own.
            raise_on_any_rank(lambda: check_model_folder(model), "reading the model's config")
            config = AutoConfig.from_pretrained(model)
            load_causal_lm(
                model, args.base_dtype, **make_engine(args.engine_options).load_options(config, args.base_dtype)
            )
        except SMTError as error:
            return str(error)
    return "nothing"
