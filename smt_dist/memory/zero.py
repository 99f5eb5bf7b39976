"""DeepSpeed's ZeRO, which doesn't run on fake tensors: what it holds beside activations, from how it partitions.

Read in DeepSpeed 0.19.8 (``runtime/zero/stage_1_and_2.py``, ``stage3.py``, ``partitioned_param_coordinator.py``,
``runtime/bf16_optimizer.py``) with fp32 accumulation of gradients, as ``train.py`` sets it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from smt_dist.errors import SMTError
from smt_dist.memory.categories import Memory

FP32 = 4


@dataclass(frozen=True)
class ZeroSettings:
    """The sizes of a ``zero_optimization`` section, in elements, with DeepSpeed's defaults."""

    stage: int
    reduce_bucket_size: int = 500_000_000
    overlap_comm: bool = False
    prefetch_bucket_size: int = 50_000_000
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    param_persistence_threshold: int = 100_000

    @staticmethod
    def of(stage: int, section: dict[str, Any]) -> ZeroSettings:
        """From the JSON's section; values that are ``"auto"`` take DeepSpeed's defaults.

        Raises:
            SMTError: it offloads, or a size is no number.
        """
        for key in ("offload_optimizer", "offload_param"):
            if (section.get(key) or {}).get("device", "none") != "none":
                raise SMTError(f"--deepspeed: {key}: offloading isn't planned yet")
        values: dict[str, Any] = {}
        for name in ZeroSettings.__dataclass_fields__:
            given = section.get(name, section.get(f"stage3_{name}", "auto"))
            if name == "stage" or given == "auto":
                continue
            if not isinstance(given, int | float):
                raise SMTError(f"--deepspeed: zero_optimization.{name}: {given!r} is no number")
            values[name] = bool(given) if name == "overlap_comm" else int(given)
        return ZeroSettings(stage, **values)


@dataclass(frozen=True)
class ZeroModel:
    """What ZeRO partitions.

    Attributes:
        settings: of the stage.
        ranks: over which.
        width: bytes of a weight as it computes.
        frozen: sizes of the weights that aren't trained.
        trained: sizes of those that are.
        base_is_trained: full fine-tuning.
    """

    settings: ZeroSettings
    ranks: int
    width: int
    frozen: list[int]
    trained: list[int]
    base_is_trained: bool

    def resident(self, training: bool = True) -> Memory:
        """What is there all the time; ``training``: with the optimizer, not as in the warm-up."""
        base = self.trained if self.base_is_trained else self.frozen
        blocks = [] if self.base_is_trained else self.trained
        memory = Memory(base_weights=self._held(base), gathered_weights=self.gathered(training))
        if not training:
            return memory
        count = sum(self.trained)
        share = -(-count // self.ranks)
        gradients, communication = self._reduction(count, share)
        return memory.with_(
            blocks=self._held(blocks, persists=False),
            gradients=gradients,
            optimizer_state=3 * FP32 * share,  # a master, also in fp32, and two moments
            communication=communication,
        )

    def _held(self, sizes: list[int], persists: bool = True) -> int:
        if self.settings.stage < 3:
            return self.width * sum(sizes)
        shards = sum(-(-size // self.ranks) for size in sizes)
        limit = self.settings.param_persistence_threshold
        # Small ones stay whole beside their shards.
        whole = sum(size for size in sizes if size < limit) if persists else 0
        return self.width * (shards + whole)

    def _reduction(self, count: int, share: int) -> tuple[int, int]:
        """(bytes of gradients, bytes of the buffers in which they are reduced)."""
        bucket = self.settings.reduce_bucket_size
        if self.settings.stage == 1 and self.width < FP32:  # BF16_Optimizer: fp32 gradients, whole
            return FP32 * count, FP32 * min(count, bucket)
        if self.settings.stage == 1:
            return FP32 * count + FP32 * share, FP32 * min(count, bucket)
        buffers = 2 if self.settings.overlap_comm and self.settings.stage == 2 else 1
        return FP32 * share, buffers * bucket * self.width

    def gathered(self, training: bool) -> int:
        """ZeRO-3's whole weights: those used again within the reuse distance at the turn from forward to backward.

        At the turn a weight n elements before the end comes back after 2 n elements; so half of the distance is kept,
        and what is fetched ahead, but never more than all.
        """
        if self.settings.stage < 3:
            return 0
        limit = self.settings.param_persistence_threshold
        large = [size for size in [*self.frozen, *(self.trained if training else [])] if size >= limit]
        kept = min(self.settings.max_reuse_distance, self.settings.max_live_parameters) // 2
        window = kept + self.settings.prefetch_bucket_size + max(large, default=0)
        return self.width * min(sum(large), window)
