"""Define ``model.smt``, the state of a model with blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

from smt_dist.config import SMTConfig
from smt_dist.sparse.blocks import BlockSelection


@dataclass
class SparseState:
    """Hold a model's state between :func:`apply_selection` and :func:`remove_blocks`.

    Attributes:
        selection: the trained blocks.
        config: saved in this model's adapters; None: a config is derived from the selection.
        base_fingerprint: of the base without blocks (:class:`smt_dist.sparse.fingerprint.Fingerprint`).
        frozen_groups: module -> group, of the blocks that a re-selection has frozen.
        reselected_at: the optimizer step of the last re-selection; 0: it was in an earlier run; None: there was none.
        is_compared: whether the selection has been found equal on all ranks.
    """

    selection: BlockSelection
    config: SMTConfig | None
    base_fingerprint: str
    frozen_groups: dict[str, str] = field(default_factory=dict)
    reselected_at: int | None = None
    is_compared: bool = False

    def multiplier_of(self, module: str) -> float:
        """Return the learning-rate multiplier of a module's group; 1 without a group or config."""
        group = self.selection.groups.get(module)
        multipliers = {g.name: g.lr_multiplier for g in self.config.groups} if self.config is not None else {}
        return multipliers.get(group, 1.0)
