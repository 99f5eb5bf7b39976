"""Fine-tune language models by Sparse Matrix Tuning (arXiv 2405.15525), also across devices.

The names exported here are the stable API. Behind it lie subpackages, each of which imports only those below it:

====================  ==============================================================================
``cli``               programs and console commands
``memory.record``     record a rank's memory in a run
``memory.plan``       plan a rank's memory before a launch
``training``          training jobs: arguments, loading, warm-up, trainer, resume
``report``            a page and plots of a selection
``selection``         score blocks on batches and select the blocks to train
``checkpoint``        files on disk: adapters, checkpoints, merged models
``fault_tolerance``   lost ranks, signals, replica divergence, non-finite values
``engines``           sharding of base, masters and optimizer state: ddp, FSDP2, DeepSpeed ZeRO
``sparse``            blocks, and layers and models that contain them
``models``            read a base, and change how it computes
``data``              turn rows of a file into token sequences and batches
====================  ==============================================================================
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smt_dist.checkpoint.adapter import Adapter, load_adapter, read_adapter, save_adapter
    from smt_dist.config import SMTConfig
    from smt_dist.errors import SMTError
    from smt_dist.selection.block_scores import BlockScores
    from smt_dist.selection.select import select_blocks
    from smt_dist.selection.warmup import collect_scores
    from smt_dist.sparse.blocks import BlockGrid, BlockSelection
    from smt_dist.sparse.linear import SparseLinear
    from smt_dist.sparse.merge import merge_blocks, unmerge_blocks
    from smt_dist.sparse.surgery import apply_selection, blocks_disabled, remove_blocks, sparse_layers, write_values

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "BlockGrid",
    "BlockScores",
    "BlockSelection",
    "SMTConfig",
    "SMTError",
    "SparseLinear",
    "apply_selection",
    "blocks_disabled",
    "collect_scores",
    "load_adapter",
    "merge_blocks",
    "read_adapter",
    "remove_blocks",
    "save_adapter",
    "select_blocks",
    "sparse_layers",
    "unmerge_blocks",
    "write_values",
]

# Imported on first use, so that --help of a command, and code that needs only the errors, doesn't wait for torch.
_HOMES = {
    "smt_dist.checkpoint.adapter": ("Adapter", "load_adapter", "read_adapter", "save_adapter"),
    "smt_dist.config": ("SMTConfig",),
    "smt_dist.errors": ("SMTError",),
    "smt_dist.selection.block_scores": ("BlockScores",),
    "smt_dist.selection.select": ("select_blocks",),
    "smt_dist.selection.warmup": ("collect_scores",),
    "smt_dist.sparse.blocks": ("BlockGrid", "BlockSelection"),
    "smt_dist.sparse.linear": ("SparseLinear",),
    "smt_dist.sparse.merge": ("merge_blocks", "unmerge_blocks"),
    "smt_dist.sparse.surgery": (
        "apply_selection",
        "blocks_disabled",
        "remove_blocks",
        "sparse_layers",
        "write_values",
    ),
}


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
