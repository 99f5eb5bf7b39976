"""Calculate what DeepSpeed's ZeRO holds beside activations, from how it partitions.

ZeRO doesn't run on fake tensors.

Read in DeepSpeed 0.19.8 (``runtime/zero/stage_1_and_2.py``, ``stage3.py``, ``partitioned_param_coordinator.py``,
``runtime/bf16_optimizer.py``) with fp32 accumulation of gradients, as ``train.py`` sets it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from smt_dist.errors import SMTError
from smt_dist.memory.plan.categories import Memory

FP32 = 4


@dataclass(frozen=True)
class ZeroSettings:
    """Hold the sizes of a ``zero_optimization`` section, in elements.

    With DeepSpeed's defaults.
    """

    stage: int
    reduce_bucket_size: int = 500_000_000
    overlap_comm: bool = False
    prefetch_bucket_size: int = 50_000_000
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    param_persistence_threshold: int = 100_000

    @staticmethod
    def of(stage: int, section: dict[str, Any]) -> ZeroSettings:
        """Read the JSON's section; values that are ``"auto"`` take DeepSpeed's defaults.

        Raises:
            SMTError: it offloads, or a size is no number.
        """
        for key in ("offload_optimizer", "offload_param"):
            offload = section.get(key) or {}
            if not isinstance(offload, dict) or offload.get("device", "none") != "none":
                raise SMTError(f"--deepspeed: {key}: offloading isn't planned yet")
        values: dict[str, Any] = {}
        for name in ZeroSettings.__dataclass_fields__:
            given = section.get(name, section.get(f"stage3_{name}", "auto"))
            if name == "stage" or given == "auto":
                continue
            if not isinstance(given, int | float) or not math.isfinite(given):
                raise SMTError(f"--deepspeed: zero_optimization.{name}: {given!r} is no number")
            values[name] = bool(given) if name == "overlap_comm" else int(given)
        return ZeroSettings(stage, **values)


@dataclass(frozen=True)
class ZeroModel:
    """Describe what ZeRO partitions.

    Attributes:
        settings: of the stage.
        ranks: over which.
        width: bytes of a weight as it computes.
        frozen: sizes of the weights that aren't trained.
        trained: sizes of those that are.
        base_is_trained: full fine-tuning.
        largest_in_layers: elements of the largest weight of a layer, beside embedding and head.
        logits: elements of a micro-batch's logits; 0: they are never whole, as the loss is chunked.
        copies: gloo's: what is gathered is there once more for that moment.
    """

    settings: ZeroSettings
    ranks: int
    width: int
    frozen: list[int]
    trained: list[int]
    base_is_trained: bool
    largest_in_layers: int = 0
    logits: int = 0
    copies: bool = False

    def moments(self, traced: Mapping[str, Memory], gradient_width: int) -> dict[str, Memory]:
        """Return the moments of a training step under ZeRO.

        Args:
            traced: the moments of one plain rank: activations, what is temporary, and the gradients so far.
            gradient_width: bytes of an element of these gradients.
        """
        moments = {}
        for name, memory in self.with_gathered(traced).items():
            done = memory.gradients // gradient_width
            own = self._step() if name == "step" else self._backward(done) if name.startswith("backward") else Memory()
            held = self.resident().plus(**own.as_dict())
            moments[name] = held.plus(
                gathered_weights=memory.gathered_weights, activations=memory.activations, temporary=memory.temporary
            )
        # What is left in the bucket is reduced when the backward is done.
        moments["reduction"] = self.resident().plus(**self._end_of_backward().as_dict())
        return moments

    def resident(self, training: bool = True) -> Memory:
        """Return what is held all the time.

        ``training``: with the optimizer, not as in the warm-up.
        """
        base = self.trained if self.base_is_trained else self.frozen
        blocks = [] if self.base_is_trained else self.trained
        memory = Memory(base_weights=self._held(base))
        if not training:
            return memory
        memory = memory.with_(
            blocks=self._held(blocks, persists=False),
            optimizer_state=3 * FP32 * self.share,  # a master, also in fp32, and two moments
        )
        if self._plain_stage_1:
            return memory.with_(gradients=(FP32 + self.width) * sum(self.trained))
        if self.settings.stage < 3:
            return memory
        # Both are made with the optimizer, in the dtype in which gradients cross the network and add up.
        return memory.with_(gradients=FP32 * self.share, communication=FP32 * self.settings.reduce_bucket_size)

    @property
    def _plain_stage_1(self) -> bool:
        """Return whether DeepSpeed uses ``BF16_Optimizer``, which has no bucket.

        It does for ZeRO-1 with narrow weights and fp32 gradients.

        It adds up every gradient in fp32 from the beginning, and keeps the narrow ones, zeroed.
        """
        return self.settings.stage == 1 and self.width < FP32

    @property
    def share(self) -> int:
        """Return the trained elements whose state this rank keeps."""
        return -(-sum(self.trained) // self.ranks)

    @property
    def _oversized(self) -> int:
        """Return the largest trained weight if it exceeds the bucket and is reduced alone."""
        largest = max(self.trained, default=0) if self.base_is_trained else 0
        return largest if largest > self.settings.reduce_bucket_size else 0

    def _backward(self, done: int) -> Memory:
        """Return what is held beside the resident memory in the backward.

        When ``done`` elements have their gradients.

        ZeRO-1 keeps them all to the end. ZeRO-2 and 3 copy them into the bucket, which ZeRO-1 and 2 make when
        the first comes, and reduce it when it is full: then this rank's share appears.
        """
        if not done or self._plain_stage_1:
            return Memory()
        bucket = self.settings.reduce_bucket_size
        full = max(bucket, self._oversized) if done > bucket else self._oversized if done >= self._oversized else 0
        if self.settings.stage == 1:
            return Memory(gradients=FP32 * done, communication=FP32 * bucket)
        if self.settings.stage == 3:
            return Memory(temporary=self._copies(full))
        buffers = 2 if self.settings.overlap_comm else 1
        return Memory(
            gradients=FP32 * self.share if full else 0,
            communication=buffers * self.width * bucket,
            temporary=self._copies(full),
        )

    def _end_of_backward(self) -> Memory:
        count = sum(self.trained)
        if self._plain_stage_1:
            return Memory()
        if self.settings.stage == 1:
            # A gradient goes when it is copied into the bucket; so with the bucket's flattened copy there are as many
            # elements as before, and this rank's share. One that is too large for the bucket isn't copied.
            bucket = self.settings.reduce_bucket_size
            return Memory(gradients=FP32 * (count + self.share), communication=FP32 * bucket)
        end = self._backward(count)
        rest = max(min(count, self.settings.reduce_bucket_size), self._oversized)
        gradients = FP32 * self.share if self.settings.stage == 2 else 0
        return end.with_(gradients=gradients, temporary=self._copies(rest))

    def _copies(self, elements: int) -> int:
        """Return bytes of copies while so many elements are reduced.

        They are flattened once more, and where they are narrower also in fp32.

        ZeRO-3's bucket is in fp32 already; a weight too large for it is brought there first.
        """
        narrow = self.width < FP32
        if self.settings.stage == 3:
            return FP32 * elements * (2 if narrow and elements == self._oversized else 1)
        return (self.width + FP32 if narrow else FP32) * elements

    def _step(self) -> Memory:
        """Return what the optimizer's step holds of this rank's gradients.

        Their norms are taken in fp64, then they are flattened once more.

        Not so in ZeRO-2 in bf16, which keeps them flat.
        """
        if self._plain_stage_1:
            return Memory(temporary=FP32 * self.share)
        flat = self.settings.stage < 3 and self.width < FP32
        held = 0 if self.settings.stage == 3 else FP32 * self.share
        largest = max(self.trained, default=0) if self.base_is_trained else 0
        norm = 2 * FP32 * min(largest // (self.ranks if self.settings.stage == 3 else 1), self.share)
        return Memory(gradients=held, temporary=max(norm, 0 if flat else FP32 * self.share))

    def _held(self, sizes: list[int], persists: bool = True) -> int:
        if self.settings.stage < 3:
            return self.width * sum(sizes)
        shards = sum(-(-size // self.ranks) for size in sizes)
        limit = self.settings.param_persistence_threshold
        # Small ones stay whole beside their shards.
        whole = sum(size for size in sizes if size < limit) if persists else 0
        return self.width * (shards + whole)

    def with_gathered(self, traced: Mapping[str, Memory]) -> dict[str, Memory]:
        """Add the whole weights to each moment, and the moment in which the head is gathered.

        Args:
            traced: the moments of one plain rank.
        """
        moments = dict(traced)
        if self.settings.stage < 3:
            return moments
        for name, memory in traced.items():
            if name.startswith(("forward", "backward")):
                used = self._used(name)
                # The copy is gone when the weight is used.
                temporary = max(memory.temporary, used if self.copies else 0)
                moments[name] = memory.with_(gathered_weights=self._window(used), temporary=temporary)
        # Of the loss there is nothing yet, or in the backward of whole logits their gradient.
        name = "backward head" if self.logits else "forward head"
        head = 0 if self.ranks == 1 and self.logits else self._largest
        moments[f"{name}, gathering"] = traced[name].with_(
            gathered_weights=self._window(head),
            gradients=0,
            activations=max(0, traced[name].activations - FP32 * self.logits),
            temporary=self.width * self.logits + (head if self.copies else 0),
        )
        return moments

    @property
    def _largest(self) -> int:
        """Return the bytes of the largest gathered weight: the head or the embedding."""
        return self.width * max(self._gathers(self.trained if self.base_is_trained else self.frozen), default=0)

    def _gathers(self, sizes: list[int]) -> list[int]:
        """Return the sizes that are gathered: those that don't stay whole."""
        return [size for size in sizes if size >= self.settings.param_persistence_threshold]

    def _used(self, moment: str) -> int:
        """Return the bytes of the largest weight that a moment uses, beside what is kept.

        One rank gathers nothing, except for the chunked loss, which asks for the head itself.
        """
        if moment == "forward head" and not self.logits:
            return self._largest
        if self.ranks == 1:
            return 0
        if moment.endswith("head"):
            if not self.logits:
                return 0  # the forward has worked the gradient out
            # The peak is in the loss, for which the head's weight isn't needed; where it is, there is a copy less.
            return max(0, self._largest - FP32 * self.logits)
        if "embedding" in moment or (self.base_is_trained and moment == "backward layer 0"):
            return self._largest  # a trained embedding's backward gathers it, too
        return self.width * self.largest_in_layers

    def _window(self, used: int) -> int:
        """Return the bytes of whole weights: ``used``, and those kept for their next use.

        That is within the reuse distance. Where the forward turns into the backward a weight n elements before the end
        comes back after 2 n elements; so half of the distance is kept, and what is fetched ahead, but never more than
        all. One rank keeps nothing.
        """
        if self.ranks == 1:
            return used
        kept = min(self.settings.max_reuse_distance, self.settings.max_live_parameters) // 2
        window = self.width * (kept + self.settings.prefetch_bucket_size) + used
        return min(self.width * sum(self._gathers(self.frozen + self.trained)), window)
