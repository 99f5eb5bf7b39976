"""Record one stretch of a run, change by change."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from smt_dist.memory.plan.request import text_config
from smt_dist.memory.plan.trace import watch_layers
from smt_dist.memory.plan.tracker import BACKWARD, FORWARD
from smt_dist.memory.record.allocations import CpuAllocations, CudaStatistics
from smt_dist.memory.record.held import all_tensors, held_by_model, held_by_optimizer
from smt_dist.memory.record.real_tracker import RealTracker
from smt_dist.memory.record.timeline import Timeline, timeline_of_allocations, timeline_of_stretches

OnBatch = Callable[[str, int, int], None]


class Window:
    """Record from :meth:`open` to :meth:`close`.

    Keep it short: the log grows with every operator that runs.

    Args:
        device_type: whose memory.
        statistics: of a GPU's allocator; None: the CPU's allocations are recorded.
    """

    def __init__(self, device_type: str = "cpu", statistics: CudaStatistics | None = None) -> None:
        self._cuda = statistics
        self._cpu = CpuAllocations() if statistics is None else None
        self._tracker = RealTracker(device_type, self._end_moment)
        self._handles: list[RemovableHandle] = []
        self._pass = ExitStack()
        self._peaks: list[int] = []
        self._optimizer: torch.optim.Optimizer | None = None

    def open(self, phase: str, moment: str) -> None:
        """Count everything that exists now as held.

        It is temporary until :meth:`register` assigns a category.
        """
        gc.collect()
        self._tracker.__enter__()
        self._tracker.register(all_tensors(), "temporary")
        source = self._cpu or self._cuda
        source.start()
        self._tracker.phase = phase
        self._tracker.moment(moment)

    def register(self, held: Iterable[tuple[str, Any]]) -> None:
        """Assign tensors to categories, also those made since :meth:`open`."""
        for category, tensors in held:
            self._tracker.register(tensors, category)

    def register_model(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Register what model and optimizer hold.

        What the optimizer holds only within a backward is registered there.
        """
        self._optimizer = optimizer
        self._tracker.gathers_in_place = any(hasattr(parameter, "ds_id") for parameter in model.parameters())
        self.register(held_by_model(model))
        self.register(held_by_optimizer(optimizer))

    def mark(self, phase: str, moment: str) -> None:
        """Begin a moment."""
        self._tracker.phase = phase
        self._tracker.moment(moment)

    def watch(self, model: PreTrainedModel, on_batch: OnBatch | None = None) -> None:
        """Separate forward from backward, and name the moments by layer.

        Args:
            model: the bare model.
            on_batch: is told the phase, rows, and tokens a row, of each batch.
        """
        layers = int(text_config(model.config).num_hidden_layers)

        def before(_module: nn.Module, _args: tuple, inputs: dict[str, Any]) -> None:
            tokens = inputs.get("input_ids")
            if on_batch is not None and tokens is not None:
                on_batch(self._tracker.phase, *tokens.shape)
            self.mark(self._tracker.phase, "forward embedding")
            self._enter(FORWARD)

        def after(*_: Any) -> None:
            self.mark(self._tracker.phase, "backward head")
            self._enter(BACKWARD)

        self._handles += [model.register_forward_pre_hook(before, with_kwargs=True), model.register_forward_hook(after)]
        self._handles += watch_layers(model, self._tracker, layers)

    def watch_gradients(self, model: nn.Module) -> None:
        """Register gradients when they appear.

        To be called before an optimizer installs hooks that remove them.
        """
        for parameter in model.parameters():
            if parameter.requires_grad:
                self._handles.append(
                    parameter.register_post_accumulate_grad_hook(
                        lambda parameter: self._tracker.register(parameter.grad, "gradients")
                    )
                )

    def close(self) -> Timeline:
        """End the recording; the log is gone after it."""
        for handle in self._handles:
            handle.remove()
        self._pass.close()
        self._end_moment()
        allocations = self._cpu.stop() if self._cpu is not None else []
        stretches = self._tracker.stretches()
        self._tracker.__exit__(None, None, None)
        marks = self._tracker.marks
        if self._cuda is not None:
            return timeline_of_stretches(stretches, marks).raised(self._peaks)
        return timeline_of_allocations(allocations, stretches, marks)

    def _end_moment(self) -> None:
        if self._optimizer is not None:
            self.register(held_by_optimizer(self._optimizer))
        if self._cuda is not None:
            self._peaks.append(self._cuda.peak())

    def _enter(self, name: str) -> None:
        self._pass.close()
        self._pass.enter_context(self._tracker.in_pass(name))
