"""Run DeepSpeed ZeRO-1, 2 and 3.

DeepSpeed shards the base (stage 3) and the blocks' optimizer state itself.

Blocks, masters and moments are read and written through ``deepspeed.utils``' public ``safe_get`` and ``safe_set``
functions. What has no public way stands in ``_flat_partitions``, ``held_tensors``, ``_create_moments``,
``_link_moments`` and ``_forget_engine``, checked on DeepSpeed 0.19.8.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import nn
from transformers import PreTrainedConfig

from smt_dist.engines.base import BlockState, Moments, Tuning, unwrapped
from smt_dist.engines.elementwise import counter_state, counter_value, is_counter, is_moment, refuse_unless_elementwise
from smt_dist.errors import SMTError
from smt_dist.sparse.sharded import full_numel, full_shape
from smt_dist.sparse.surgery import sparse_layers

# DeepSpeed's own zero_optimization.reduce_bucket_size, in elements.
DEFAULT_BUCKET = 500_000_000


class DeepSpeedEngine:
    """Run ZeRO as the DeepSpeed JSON configures it.

    Args:
        config: the JSON with every ``"auto"`` filled in.
    """

    name = "deepspeed"

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    @property
    def stage(self) -> int:
        """Return the ZeRO stage."""
        return int(self.config.get("zero_optimization", {}).get("stage", 0))

    def load_options(self, config: PreTrainedConfig, dtype: torch.dtype) -> dict[str, Any]:  # noqa: ARG002
        return {}  # transformers sees the active ZeRO-3 config itself

    def prepare_base(self, model: nn.Module) -> None:
        pass

    @contextmanager
    def scoring(self, model: nn.Module) -> Iterator[None]:
        """Make an engine without optimizer gather the weights under ZeRO-3.

        It is destroyed at the end.
        """
        if self.stage < 3:
            yield
            return
        config = _without_optimizer(self.config)
        # Offloaded optimizer state belongs to an optimizer, which this engine doesn't have.
        config["zero_optimization"].pop("offload_optimizer", None)
        engine, *_ = deepspeed.initialize(model=model, config=config)
        try:
            yield
        finally:
            engine.destroy()
            _forget_engine(model)

    def forget(self, model: nn.Module) -> None:
        _forget_engine(model)

    @contextmanager
    def full_finetuning(self, model: nn.Module, learning_rate: float, accumulation: int) -> Iterator[Tuning]:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        overrides = {"gradient_accumulation_steps": accumulation, "gradient_clipping": 0.0}
        config = {**_without_optimizer(self.config), **overrides}
        optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        try:
            # The loss counts the tokens of the whole global step already.
            yield Tuning(engine, partial(engine.backward, scale_wrt_gas=False), engine.step)
        finally:
            engine.destroy()
            _forget_engine(model)

    def make_optimizer(
        self,
        groups: list[dict[str, Any]],
        optimizer_class: type[torch.optim.Optimizer],
        options: dict[str, Any],
        may_be_idle: bool = False,  # noqa: ARG002
        model: nn.Module | None = None,  # noqa: ARG002
    ) -> torch.optim.Optimizer:
        # ZeRO flattens parameters too, so it can't do more than ShardedBlockOptimizer can.
        refuse_unless_elementwise(optimizer_class, options)
        elements = sum(full_numel(parameter) for group in groups for parameter in group["params"])
        # DeepSpeed allocates the whole bucket, 0.5e9 elements unless told otherwise, however few gradients there are.
        section = self.config["zero_optimization"]
        if isinstance(given := section.get("reduce_bucket_size", DEFAULT_BUCKET), int | float):
            section["reduce_bucket_size"] = min(int(given), elements)
        return optimizer_class(groups, **options)

    def read_blocks(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,  # noqa: ARG002
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, layer in sparse_layers(model).items():
            yield name, self._master(layer.delta)

    def write_blocks(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,  # noqa: ARG002
        deltas: Mapping[str, torch.Tensor],
    ) -> None:
        for name, layer in sparse_layers(model).items():
            self._set_master(layer.delta, deltas[name])

    def read_moments(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Moments:
        zero = _zero_optimizer(optimizer)
        inner = zero.optimizer.state
        flats = [flat for flat in _flat_partitions(zero) if flat in inner]
        names = sorted({key for flat in flats for key, value in inner[flat].items() if is_moment(flat, value)})
        if names:
            _link_moments(zero)

        def tensors() -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
            for name, layer in sparse_layers(model).items():
                shape = full_shape(layer.delta)
                yield name, {key: safe_get_full_optimizer_state(layer.delta, key).cpu().view(shape) for key in names}

        return Moments(names, _counters(zero.optimizer, flats), tensors())

    def write_state(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        states: Iterator[BlockState],
        counters: dict[str, int | float],
    ) -> None:
        zero = _zero_optimizer(optimizer)
        layers = sparse_layers(model)
        created: set[str] = set()
        for state in states:
            delta = layers[state.module].delta
            self._set_master(delta, state.delta)
            if state.moments and not created:
                created = set(state.moments)
                _create_moments(zero, sorted(created), counters)
            for key, value in state.moments.items():
                safe_set_full_optimizer_state(delta, value.to(delta.device), key)

    def damaged_block(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,  # noqa: ARG002
    ) -> str | None:
        if self.stage < 3 or self._state_is_on_disk():
            return None  # stages 1 and 2: the masters of a block may lie on several ranks
        for name, layer in sparse_layers(model).items():
            shard = layer.delta.ds_tensor
            master = safe_get_local_fp32_param(layer.delta)
            if master is not None and not torch.equal(master.to(shard.device, shard.dtype), shard[: master.numel()]):
                return name
        return None

    def _state_is_on_disk(self) -> bool:
        offload = self.config.get("zero_optimization", {}).get("offload_optimizer") or {}
        return offload.get("device") == "nvme"

    def memory_bytes(self, optimizer: torch.optim.Optimizer) -> dict[str, int]:
        zero = _zero_optimizer(optimizer)
        flats, state = _flat_partitions(zero), zero.optimizer.state
        moments = [value for flat in flats for value in state.get(flat, {}).values() if is_moment(flat, value)]
        return {"masters": sum(flat.nbytes for flat in flats), "moments": sum(moment.nbytes for moment in moments)}

    def _master(self, delta: nn.Parameter) -> torch.Tensor:
        value = safe_get_full_fp32_param(delta)
        if value is None:
            raise RuntimeError("DeepSpeed holds no fp32 master of a block: the engine isn't initialised for training")
        return value.detach().view(full_shape(delta)).float().cpu()

    def _set_master(self, delta: nn.Parameter, value: torch.Tensor) -> None:
        value = value.to(delta.device)
        safe_set_full_fp32_param(delta, value)
        # The copy that computes is the rounding of the master, as after an optimizer step.
        with torch.no_grad():
            if hasattr(delta, "ds_id"):
                with deepspeed.zero.GatheredParameters([delta], modifier_rank=0):
                    delta.copy_(value)
            else:
                delta.copy_(value)


def _forget_engine(model: nn.Module) -> None:
    """Remove what ``destroy`` leaves in the modules.

    These are backward functions that are bound to the destroyed engine.

    The next engine would go on using them: it would keep the dead one alive, and under gradient checkpointing release
    weights between recomputation and use.
    """
    for module in model.modules():
        for name in ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt", "ds_grads_remaining"):
            module.__dict__.pop(name, None)


def _without_optimizer(config: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of the config for the warm-up's engine, without an optimizer.

    Values that are still "auto" (Trainer fills them later) take defaults.
    """

    def without_auto(value: Any) -> Any:
        if not isinstance(value, dict):
            return copy.deepcopy(value)
        return {key: without_auto(inner) for key, inner in value.items() if inner != "auto"}

    return {key: value for key, value in without_auto(config).items() if key not in ("optimizer", "scheduler")}


def _zero_optimizer(optimizer: Any) -> Any:
    zero = unwrapped(optimizer)
    if not hasattr(zero, "optimizer"):
        raise SMTError(
            f"deepspeed: a checkpoint needs ZeRO-1, 2 or 3; this engine's optimizer is {type(zero).__name__}"
        )
    return zero


def _flat_partitions(zero: Any) -> list[torch.Tensor]:
    """Return this rank's flat fp32 partitions, which the inner optimizer's state belongs to."""
    for name in ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat", "fp32_groups_flat_partition"):
        if hasattr(zero, name):  # ZeRO-1/2, ZeRO-3, bf16 with fp32 gradients under stage 1
            return list(getattr(zero, name))
    raise SMTError(f"deepspeed: {type(zero).__name__} is not known to smt_dist (checked on DeepSpeed 0.19.8)")


def held_tensors(zero: Any) -> Iterator[tuple[str, Any]]:
    """Yield (category, tensors) that DeepSpeed's optimizer holds on this rank.

    Categories are those of :mod:`smt_dist.memory.plan.categories`.
    """
    flats = _flat_partitions(zero)
    yield "base_weights", getattr(zero, "fp16_partitioned_groups_flat", [])
    yield "optimizer_state", [flats, [list(zero.optimizer.state[flat].values()) for flat in flats]]
    names = ("averaged_gradients", "all_grad_tensors", "fp32_groups_gradients_flat", "grad_partitions_flat_buffer")
    yield "gradients", [*(list(_tensors(getattr(zero, name, None))) for name in names), *(flat.grad for flat in flats)]
    buckets = getattr(zero, "ipg_buckets", {}).values()
    yield "communication", list(_tensors([getattr(bucket, "buffer", None) for bucket in buckets]))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in dicts and lists, DeepSpeed's own kinds of list included."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _counters(inner: torch.optim.Optimizer, flats: list[torch.Tensor]) -> dict[str, int | float]:
    """Return what the inner optimizer counts for all elements alike."""
    states = [inner.state[flat] for flat in flats]
    counters = {key: counter_value(value) for state in states for key, value in state.items() if is_counter(value)}
    steps = [int(group["step"]) for group in inner.param_groups if "step" in group]  # FusedAdam
    return counters | ({"step": max(steps)} if steps else {})


def _create_moments(zero: Any, keys: list[str], counters: dict[str, int | float]) -> None:
    """Create the inner optimizer's state and link it to the blocks.

    Without this it would be created in the first step.
    """
    inner = zero.optimizer
    for flat in _flat_partitions(zero):
        moments = {key: torch.zeros_like(flat) for key in keys}
        inner.state[flat] = {**counter_state(inner, flat, counters), **moments}
    for group in inner.param_groups:
        if "step" in group:
            group["step"] = int(counters.get("step", 0))
    _link_moments(zero)


def _link_moments(zero: Any) -> None:
    """Link the inner optimizer's state to the blocks.

    ZeRO-3 looks it up itself; the other stages keep links.

    Done again before reading: DeepSpeed links all groups after the first group's first step, when the others have
    no state yet, and not again; with two learning-rate multipliers, the second group's moments would be missing.
    """
    parameters = getattr(zero, "bit16_groups", getattr(zero, "bf16_groups", None))
    if parameters is not None:
        for group, flat in zip(parameters, _flat_partitions(zero), strict=True):
            lazy_init_hp_params_optimizer_state(group, flat, zero.optimizer.state)
