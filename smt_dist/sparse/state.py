"""``model.smt``: what a model with blocks knows of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from smt_dist.config import SMTConfig
from smt_dist.sparse.blocks import BlockSelection


@dataclass
class SparseState:
    """The state of a model between :func:`apply_selection` and :func:`remove_blocks`.

    Attributes:
        selection: the trained blocks.
        config: recorded in the adapters that are saved from this model; None: what the selection amounts to.
        base_fingerprint: of the base under all blocks (:class:`smt_dist.sparse.fingerprint.Fingerprint`).
        frozen_groups: module -> group, of the blocks that a re-selection has frozen.
        reselected_at: the optimizer step of the last re-selection; 0: of an earlier run; None: there was none.
        is_compared: whether all ranks are known to have the same selection.
    """

    selection: BlockSelection
    config: SMTConfig | None
    base_fingerprint: str
    frozen_groups: dict[str, str] = field(default_factory=dict)
    reselected_at: int | None = None
    is_compared: bool = False

    def multiplier_of(self, module: str) -> float:
        """Look up the learning-rate multiplier of a module's group; 1 where it has none."""
        group = self.selection.groups.get(module)
        multipliers = {g.name: g.lr_multiplier for g in self.config.groups} if self.config is not None else {}
        return multipliers.get(group, 1.0)
