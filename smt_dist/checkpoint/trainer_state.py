"""Save and check ``trainer_state.json``, typed and without paths, and results."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, FailFast, Field
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from smt_dist.config import parse_model
from smt_dist.errors import SMTError
from smt_dist.files import parse_json_object, read_text, replace_file

logger = logging.getLogger(__name__)

_Count = Annotated[int, Field(strict=True, ge=0)]
_Number = Annotated[int, Field(strict=True)] | Annotated[float, Field(strict=True)]


class CheckedState(BaseModel):
    """Check the fields of transformers 5.23's ``TrainerState`` against the types it relies on."""

    model_config = ConfigDict(extra="forbid", strict=True)

    epoch: _Number | None = 0
    global_step: _Count
    max_steps: _Count
    num_train_epochs: _Count
    logging_steps: _Number = 500
    eval_steps: _Number = 500
    save_steps: _Number = 500
    train_batch_size: _Count
    num_input_tokens_seen: _Number = 0
    total_flos: _Number = 0
    log_history: Annotated[list[dict[str, Any]], FailFast()]
    best_metric: _Number | None = None
    best_global_step: _Count | None = None
    best_model_checkpoint: str | None = None
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    is_hyper_param_search: bool = False
    trial_name: str | None = None
    trial_params: dict[str, str | int | float | bool] | None = None
    stateful_callbacks: dict[str, dict[str, Any] | list[dict[str, Any]]] = Field(default_factory=dict)


def check_trainer_state(folder: Path) -> None:
    """Refuse what Trainer would trip over.

    Raises:
        SMTError: the file is missing, damaged or of another version; names the file and the field.
    """
    path = folder / TRAINER_STATE_NAME
    parse_model(CheckedState, read_text(path), str(path))


def save_trainer_state(folder: Path, state: TrainerState, exportable: list[Any]) -> None:
    """Write ``state`` with the state of its callbacks, as Trainer does.

    The best checkpoint stands in it by its step: its path would be one of this machine.

    Args:
        folder: of the checkpoint.
        state: Trainer's.
        exportable: callbacks and the control; those that can be exported are.
    """
    for callback in exportable:
        if isinstance(callback, ExportableState):
            name, exported = type(callback).__name__, callback.state()
            if isinstance(state.stateful_callbacks.get(name), list):
                state.stateful_callbacks[name].append(exported)
            else:
                state.stateful_callbacks[name] = exported
    written = copy.copy(state)
    written.best_model_checkpoint = None
    written.save_to_json(str(folder / TRAINER_STATE_NAME))


def save_metrics(output_dir: Path, split: str, metrics: dict[str, float], combined: bool) -> None:
    """Write ``<split>_results.json`` as Trainer does.

    With ``combined`` they are added to ``all_results.json``, too.

    Raises:
        OSError: a file can't be written; the old one is untouched.
    """
    _write_json(output_dir / f"{split}_results.json", metrics)
    path = output_dir / "all_results.json"
    if combined:
        old: dict[str, Any] = {}
        if path.exists():
            try:
                old = parse_json_object(read_text(path), str(path))
            except SMTError as error:
                logger.warning("what it held is lost: %s", error)
        _write_json(path, old | metrics)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    replace_file(path, lambda beside: beside.write_text(json.dumps(content, indent=4, sort_keys=True)))
