"""Sparse Matrix Tuning (arXiv 2405.15525) for models that outgrow one device."""

from smt_dist.checkpoint.adapter import Adapter, load_adapter, read_adapter, save_adapter
from smt_dist.config import SMTConfig
from smt_dist.errors import SMTError
from smt_dist.selection.block_scores import BlockScores
from smt_dist.selection.select import select_blocks
from smt_dist.selection.warmup import collect_scores
from smt_dist.sparse.blocks import BlockGrid, BlockSelection
from smt_dist.sparse.linear import SparseLinear
from smt_dist.sparse.merge import merge_blocks, unmerge_blocks
from smt_dist.sparse.surgery import apply_selection, blocks_disabled, remove_blocks, sparse_layers

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
]
