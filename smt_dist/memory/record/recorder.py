"""Record the memory of a real run by phase, for ``smt-train --profile_memory``.

Recorded are the load, the first steps of the warm-up and its last with the selection, the engine's set-up with the
first steps of training, and the save. Of the steps between, which are like those, only what costs nothing is kept:
resident memory, and a GPU's own counters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback

from smt_dist.distributed import get_rank
from smt_dist.memory.plan.trace import tensors_of
from smt_dist.memory.record.allocations import CudaStatistics, forget_resident_peak, resident_bytes
from smt_dist.memory.record.recording import Recording
from smt_dist.memory.record.window import Window
from smt_dist.selection.scores import ScoreAccumulator
from smt_dist.selection.steps import Observer

PHASES = ("load", "warmup", "selection", "setup", "training", "save")


class Recorder:
    """Record a run of ``train.py`` on this rank.

    Args:
        device: whose memory.
        steps: of the warm-up and of training, to record from their beginning.
        cuda: ``torch.cuda``, or what stands in for it.
        enabled: do anything at all.
    """

    def __init__(self, device: torch.device, steps: int, cuda: Any = torch.cuda, enabled: bool = True) -> None:
        self.enabled = enabled
        self.recording = Recording(get_rank(), str(device))
        self._device, self._steps = device, steps
        self._statistics = CudaStatistics(device, cuda) if device.type == "cuda" else None
        self._window: Window | None = None
        self._unrecorded = False

    @contextmanager
    def phase(self, name: str, model: PreTrainedModel | None = None) -> Iterator[None]:
        """Record a phase inside the context.

        Up to the number of steps if the phase has steps, else all of it.

        Args:
            name: one of :data:`PHASES`.
            model: the bare model, once it is there.
        """
        if not self.enabled:
            yield
            return
        forget_resident_peak()
        self._unrecorded = False
        self._open(name, "beginning", model)
        try:
            yield
        finally:
            self._close()
            self._note_resident(name)

    def see_model(self, model: PreTrainedModel) -> None:
        """Register the model that a phase has made."""
        if self._window is not None:
            self._window.register_model(model)

    def observe_warmup(self, model: PreTrainedModel, steps: int) -> Observer | None:
        """Record the first steps and the end of a warm-up.

        To be passed to :func:`smt_dist.selection.warmup.collect_scores`.

        The end begins with its last step.

        Args:
            model: the bare model.
            steps: that the warm-up will have.
        """

        def observe(accumulator: ScoreAccumulator | None, done: int) -> None:
            if done == steps - 1 and self._window is None:
                self._note_resident("warmup")
                self._open("warmup", f"step {steps}", model)
            if self._window is None:
                return
            if accumulator is not None:
                self._window.register([("statistics", tensors_of(accumulator))])
            if done == steps:
                self._window.mark("selection", "tables")
            elif done == self._steps and done < steps - 1:
                self._close("warmup")
            else:
                self._window.mark("warmup", f"step {done + 1}")

        return observe if self.enabled else None

    def watch_training(self, model: PreTrainedModel) -> list[TrainerCallback]:
        """Record training; call it when the blocks exist and before the trainer does.

        Returns the trainer's callbacks.
        """
        if not self.enabled:
            return []
        if self._window is not None:
            self._window.register_model(model)
            self._window.watch_gradients(model)
        return [_StepRecorder(self, model)]

    # -- for _StepRecorder -----------------------------------------------------------------------------------------

    def begin_step(self, step: int, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
        """Begin training's step ``step`` (from 1 on in this run)."""
        if self._window is not None:
            self._window.register_model(model, optimizer)
            self._window.mark("training", f"step {step}")

    def begin_update(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
        """Note that all gradients of the step exist."""
        if self._window is not None:
            self._window.register_model(model, optimizer)
            self._window.mark("training", "step")

    def end_step(self, step: int, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
        """End the step."""
        if self._window is not None:
            self._window.register_model(model, optimizer)
            if step >= self._steps:
                self._close("training")

    # -- recording -------------------------------------------------------------------------------------------------

    def _open(self, phase: str, moment: str, model: PreTrainedModel | None) -> None:
        self._window = Window(self._device.type, self._statistics)
        self._window.open(phase, moment)
        if model is not None:
            self._window.register_model(model)
            self._window.watch(model, self._see_batch)

    def _close(self, phase: str | None = None) -> None:
        """End the window; ``phase`` goes on without."""
        if self._window is None:
            return
        window, self._window = self._window, None
        self.recording.add(window.close())
        if self._statistics is not None:
            self.recording.allocator = self._statistics.summary()
        if phase is not None:
            self._note_resident(phase)
            self._unrecorded = forget_resident_peak()

    def _note_resident(self, phase: str) -> None:
        """Note the resident peak since it was last reset.

        Steps that weren't recorded have their own.
        """
        peak = resident_bytes("VmHWM")
        if peak is None:
            return
        kept = self.recording.resident_unrecorded if self._unrecorded else self.recording.resident
        kept[phase] = max(peak, kept.get(phase, 0))
        self._unrecorded = False

    def _see_batch(self, phase: str, rows: int, tokens: int) -> None:
        batches = self.recording.batches
        batches[phase] = max((rows, tokens), batches.get(phase, (0, 0)), key=math.prod)


class _StepRecorder(TrainerCallback):
    """Notify the recorder where Trainer's steps begin and end."""

    def __init__(self, recorder: Recorder, model: PreTrainedModel) -> None:
        self._recorder, self._model, self._step = recorder, model, 0

    def on_step_begin(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        self._step += 1
        self._recorder.begin_step(self._step, self._model, optimizer)

    def on_pre_optimizer_step(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        self._recorder.begin_update(self._model, optimizer)

    def on_step_end(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        self._recorder.end_step(self._step, self._model, optimizer)
