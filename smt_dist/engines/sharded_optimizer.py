"""Wrap a torch optimizer class and shard the blocks' masters and states over ranks.

For engines whose blocks are replicated parameters (``ddp``, ``fsdp2``). A step moves the blocks once each way: one
reduce-scatter of their gradients, the wrapped optimizer's step on this rank's slice, one all-gather of their values.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakIdKeyDictionary

from smt_dist.distributed import all_gather_rows, all_reduce_sum, is_distributed
from smt_dist.engines.elementwise import counter_state, counter_value, is_counter, is_moment, refuse_unless_elementwise
from smt_dist.engines.flat import FlatParameters, Range
from smt_dist.engines.gradients import GradientSums, SlicedGradients, WholeGradients
from smt_dist.engines.in_place import PlacedValues, in_place_layers
from smt_dist.sparse.blocks import merged_blocks


class ShardedBlockOptimizer(torch.optim.Optimizer):
    """Step replicated parameters with an elementwise optimizer whose state is sharded.

    fp32 masters and the optimizer's states are both sharded.

    All parameters lie end to end in one flat buffer, cut into equal slices, one a rank (the last one is padded).
    Gradients of micro-batches add up in fp32 without communication; :meth:`clip_grad_norm_` or :meth:`step`, whichever
    comes first, averages them over ranks. Where the number of micro-batches is told, the last backward does so itself,
    slice by slice. A parameter without a gradient counts as one with a gradient of zero. Weight decay pulls a block's
    delta to zero, that is, the model to its base.

    Collective are ``step``, ``clip_grad_norm_``, ``read_master`` and ``read_moments``, with ``micro_batches`` the last
    backward, nothing else. Memory a rank, for N trained elements on W ranks, AdamW, and parameters of 2 bytes: 12 N / W
    (master, two moments) + 2 N (what computes) + 4 N (gradients; about 12 N / W for one micro-batch that is told); see
    :meth:`memory_bytes`.

    Args:
        groups: parameter groups of equal dtype and device, as for any torch optimizer; learning rate and other
            options may differ between groups and change between steps.
        optimizer_class: the optimizer to wrap. It must update each element from that element's history alone.
        options: its keyword arguments.
        reduce_dtype: in which gradients cross the network; they are added up before and used after in fp32.
        micro_batches: backwards in a step, if it is known: gradients then go to the ranks that own them while the last
            backward runs (:class:`smt_dist.engines.gradients.SlicedGradients`).
        model: whose in-place layers' weights the values are written into; None where all blocks are additive.

    Attributes:
        overflow: whether the last step was left out because the norm that was measured for it wasn't finite.

    Raises:
        SMTError: the optimizer isn't elementwise (Adafactor, LAMB, Muon, ...).
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        optimizer_class: type[torch.optim.Optimizer] = torch.optim.AdamW,
        options: dict[str, Any] | None = None,
        reduce_dtype: torch.dtype = torch.float32,
        micro_batches: int | None = None,
        model: nn.Module | None = None,
    ) -> None:
        refuse_unless_elementwise(optimizer_class, options or {})
        parameters = [parameter for group in groups for parameter in group["params"]]
        layers = in_place_layers(model, parameters)
        for layer in layers.values():
            layer.take_back()  # from an earlier optimizer
        self._flat = FlatParameters(parameters)
        self.gradients: GradientSums = WholeGradients(self._flat, reduce_dtype)
        if micro_batches is not None and is_distributed():
            self.gradients = SlicedGradients(self._flat, reduce_dtype, micro_batches)
        self._reduced = False
        self._norm: torch.Tensor | None = None
        self.overflow = False

        # In fp32 a master is a view of this rank's slice of the values, no copy of it, unless those are weights.
        own = self._flat.own
        masters = own.of(self._flat.values).to(torch.float32, copy=bool(layers))
        self._placed = PlacedValues(self._flat, layers, model, self) if layers else None
        self._group_ranges = [part.within(own) for part in self._ranges_of_groups(groups)]
        self._masters = [nn.Parameter(part.of(masters, own.start)) for part in self._group_ranges]
        self.inner = optimizer_class(
            [{**group, "params": [master]} for group, master in zip(groups, self._masters, strict=True)],
            **(options or {}),
        )
        outer = [
            {**inner, "params": group["params"]} for inner, group in zip(self.inner.param_groups, groups, strict=True)
        ]
        super().__init__(outer, self.inner.defaults)
        _collect_gradients(self, parameters)

    # -- a step ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Average the gradients over ranks, step this rank's slice, and share the new values.

        Gradients are zero afterwards.

        After :meth:`clip_grad_norm_` has found a norm that isn't finite, masters, moments and counters stay as they
        are, on all ranks alike, and :attr:`overflow` says so.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._flat.check()
        self.overflow = self._norm is not None and not _is_finite(self._norm)
        if self.overflow:
            self.zero_grad()
            return loss
        self._reduce()
        for outer, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update({key: value for key, value in outer.items() if key != "params"})
        self.inner.step()
        self.zero_grad()
        self.publish()
        return loss

    def add_gradient(self, parameter: nn.Parameter) -> None:
        """Add ``parameter.grad`` to its sum and drop it; called after each backward.

        Raises:
            RuntimeError: after :meth:`clip_grad_norm_` and before :meth:`step`: this step's gradients are reduced.
        """
        if self._reduced:
            raise RuntimeError("a backward between clip_grad_norm_ and step: its gradient would be lost")
        self.gradients.add(parameter)
        parameter.grad = None

    def zero_grad(self, set_to_none: bool = True) -> None:  # noqa: ARG002
        """Drop the gradients that were added up."""
        for parameter in self._flat.ranges:
            parameter.grad = None
        for master in self._masters:
            master.grad = None
        self.gradients.clear()
        self._reduced, self._norm = False, None

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> torch.Tensor:
        """Scale the gradients so that their norm over all blocks is at most ``max_norm``.

        Returns the norm before scaling.

        Exact: the norm of the averaged gradient, from the ranks' slices, equal bits on all ranks. Infinity only
        measures.
        """
        self._reduce()
        # In fp64 without a copy in fp64.
        norms = [torch.linalg.vector_norm(master.grad, dtype=torch.float64) for master in self._masters]
        norm = all_reduce_sum(sum(norm.square() for norm in norms)).sqrt()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for master in self._masters:
            master.grad.mul_(scale)
        self._norm = norm
        return norm.float()

    def _reduce(self) -> None:
        """Average the gradients over ranks, once per step.

        This rank's slice becomes the masters' gradients.
        """
        if self._reduced:
            return
        own = self.gradients.average()
        for master, part in zip(self._masters, self._group_ranges, strict=True):
            master.grad = part.of(own, self._flat.own.start)
        self._reduced = True

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters, all-gather the values, and write in-place weights; collective."""
        if self._placed is not None:
            self._placed.begin()
        for master, part in zip(self._masters, self._group_ranges, strict=True):
            part.of(self._flat.values).copy_(self._rounded(master, part))
        if is_distributed():
            all_gather_rows(self._flat.values, self._flat.own.of(self._flat.values))
        if self._placed is not None:
            self._placed.write()

    def _rounded(self, master: torch.Tensor, part: Range) -> torch.Tensor:
        """Return what computes for this rank's part of a master, in the values' dtype."""
        if self._placed is None:
            return master.detach().to(self._flat.values.dtype)
        return merged_blocks(part.of(self._placed.original, self._flat.own.start), master.detach())

    # -- the state, parameter by parameter ---------------------------------------------------------------------

    @property
    def counters(self) -> dict[str, int | float]:
        """Return what the wrapped optimizer counts for all elements alike, such as ``step``.

        Empty before the first step.
        """
        state = self.inner.state[self._masters[0]]
        return {key: counter_value(value) for key, value in state.items() if is_counter(value)}

    @property
    def moment_names(self) -> list[str]:
        """Return the sorted names of the elementwise states, such as ``exp_avg``.

        Empty before the first step.
        """
        master = self._masters[0]
        return sorted(key for key, value in self.inner.state[master].items() if is_moment(master, value))

    def read_master(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return a parameter's whole fp32 master on the CPU; collective."""
        group = self._group_of(parameter)
        return self._collect(parameter, self._masters[group], group)

    def read_moments(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """Return each of :attr:`moment_names` for one parameter, whole, on the CPU; collective.

        They have the parameter's shape.
        """
        group = self._group_of(parameter)
        state = self.inner.state[self._masters[group]]
        return {key: self._collect(parameter, state[key], group) for key in self.moment_names}

    def damaged_parameter(self) -> nn.Parameter | None:
        """Return the first parameter whose values here aren't the rounding of its master.

        Not collective.
        """
        for master, part in zip(self._masters, self._group_ranges, strict=True):
            values, expected = part.of(self._flat.values), self._rounded(master, part)
            wrong = values.view(torch.uint8) != expected.view(torch.uint8)
            if len(part) and bool(wrong.any()):
                index = part.start + int(wrong.nonzero()[0]) // values.element_size()
                return next(p for p, place in self._flat.ranges.items() if place.start <= index < place.stop)
        layer = None if self._placed is None else self._placed.damaged_layer()
        return None if layer is None else layer.delta

    @torch.no_grad()
    def write(
        self, parameter: nn.Parameter, master: torch.Tensor, moments: dict[str, torch.Tensor] | None = None
    ) -> None:
        """Set this rank's part of a parameter's master and moments.

        Every rank gives the same values.

        Call :meth:`publish` after the last one: until then the old values compute.

        Args:
            parameter: one of the groups'.
            master: of its shape.
            moments: name -> tensor of its shape; None leaves them alone.
        """
        group = self._group_of(parameter)
        self._write_own(parameter, self._masters[group], master, group)
        for key, value in (moments or {}).items():
            state = self.inner.state[self._masters[group]]
            if key not in state:
                state[key] = torch.zeros_like(self._masters[group])
            self._write_own(parameter, state[key], value, group)

    def set_counters(self, counters: dict[str, int | float]) -> None:
        """Put back what :attr:`counters` gave."""
        for master in self._masters:
            self.inner.state[master] |= counter_state(self.inner, master, counters)

    def memory_bytes(self) -> dict[str, int]:
        """Return bytes that this rank holds.

        ``masters``, ``moments`` (0 before the first step), ``values``, ``gradients``.

        With in-place layers also ``original``: W0. In fp32 without them the masters are a part of the values: 0. A step
        needs 4 bytes more for each of this rank's elements, and 2 for each of all with a bf16 reduction.
        """
        moments = [
            value for master in self._masters for value in self.inner.state[master].values() if is_moment(master, value)
        ]
        are_views = self._flat.values.dtype == torch.float32 and self._placed is None
        original = {} if self._placed is None else {"original": self._placed.original.nbytes}
        return original | {
            "masters": 0 if are_views else sum(m.nbytes for m in self._masters),
            "moments": sum(moment.nbytes for moment in moments),
            "values": self._flat.values.nbytes,
            "gradients": sum(tensor.nbytes for tensor in self.gradients.tensors()),
        }

    def held_tensors(self) -> Iterator[tuple[str, Any]]:
        """Yield (category, tensors) of everything that this rank holds.

        Categories are those of :mod:`smt_dist.memory.plan.categories`.
        """
        yield "gradients", self.gradients.tensors()
        yield "optimizer_state", [self._masters, [list(state.values()) for state in self.inner.state.values()]]
        if self._placed is not None:
            yield "blocks", self._placed.original
        yield "blocks", self._flat.values  # last: in fp32 the masters are a part of them

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state of this rank's slice; not collective.

        The masters aren't in it.

        Trainer and accelerate call it on one rank. To save a state, use :meth:`read_master`, :meth:`read_moments` and
        :attr:`counters`, which are free of world size.
        """
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load this rank's slice, saved by :meth:`state_dict` on the same rank of as many."""
        self.inner.load_state_dict(state_dict)
        for outer, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            outer.update({key: value for key, value in inner.items() if key != "params"})

    def _ranges_of_groups(self, groups: list[dict[str, Any]]) -> list[Range]:
        starts = [self._flat.ranges[group["params"][0]].start for group in groups]
        # The padding counts as the last group's, so that all ranks hold as much.
        return [Range(*ends) for ends in pairwise([*starts, len(self._flat.values)])]

    def _group_of(self, parameter: nn.Parameter) -> int:
        return next(i for i, group in enumerate(self.param_groups) if any(p is parameter for p in group["params"]))

    def _collect(self, parameter: nn.Parameter, own: torch.Tensor, group: int) -> torch.Tensor:
        """Collect a parameter's parts of one tensor of its group, in fp32 on the CPU; collective."""
        whole = torch.empty(parameter.numel())
        return self._flat.collect(parameter, own, self._group_ranges[group].start, whole)

    def _write_own(self, parameter: nn.Parameter, own: torch.Tensor, whole: torch.Tensor, group: int) -> None:
        place = self._flat.ranges[parameter]
        part = place.within(self._flat.own)
        if len(part):
            part.of(own, self._group_ranges[group].start).copy_(part.of(whole.reshape(-1), place.start))


def _is_finite(norm: torch.Tensor) -> bool:
    # A plan's fake tensors have no values.
    return isinstance(norm, FakeTensor) or bool(norm.isfinite())


def release_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Remove an earlier optimizer's hooks, which would go on taking gradients."""
    for parameter in parameters:
        if (hook := _HOOKS.pop(parameter, None)) is not None:
            hook.remove()


# Parameter -> its hook. Beside the parameters, not on them: a model must stay one that can be pickled.
_HOOKS: MutableMapping[nn.Parameter, RemovableHandle] = WeakIdKeyDictionary()


def _collect_gradients(optimizer: ShardedBlockOptimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Add each micro-batch's gradient to its fp32 sum and drop it.

    This ends when the optimizer is gone.
    """
    reference = weakref.ref(optimizer)

    def collect(parameter: nn.Parameter) -> None:
        owner = reference()
        if owner is None:
            release_gradients([parameter])
        else:
            owner.add_gradient(parameter)

    for parameter in parameters:
        release_gradients([parameter])
        _HOOKS[parameter] = parameter.register_post_accumulate_grad_hook(collect)
