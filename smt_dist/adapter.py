"""The small artefact on disk: an adapter folder, saved, checked and loaded.

``smt_config.json``, ``smt_selection.json``, ``smt_blocks.safetensors`` (one fp32 tensor a module: the deltas'
masters), ``README.md`` (model card) and ``smt_manifest.json`` (sizes and checksums). Nothing is pickled, and nothing
depends on engine or world size.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from smt_dist.blocks import BlockSelection
from smt_dist.config import GroupConfig, SMTConfig
from smt_dist.errors import SMTError
from smt_dist.files import check_tensors, read_header, read_tensors, write_tensors
from smt_dist.model import apply_selection, base_fingerprint, remove_blocks, sparse_layers
from smt_dist.saves import MANIFEST_FILE, read_manifest, saving, verify
from smt_dist.targets import base_modules, takes_blocks

logger = logging.getLogger(__name__)

CONFIG_FILE = "smt_config.json"
SELECTION_FILE = "smt_selection.json"
BLOCKS_FILE = "smt_blocks.safetensors"
CARD_FILE = "README.md"


class Adapter(NamedTuple):
    """An adapter folder's content.

    Attributes:
        config: the config it was trained with.
        selection: its blocks.
        deltas: module name -> fp32 ``[blocks * block_rows, block_cols]`` on the CPU.
        base_fingerprint: of the base it was trained on (:func:`smt_dist.model.base_fingerprint`).
    """

    config: SMTConfig
    selection: BlockSelection
    deltas: dict[str, torch.Tensor]
    base_fingerprint: str


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    deltas: Iterable[tuple[str, torch.Tensor]] | None = None,
    card: str = "",
) -> None:
    """Write ``model``'s blocks as an adapter folder, whole or not at all (:mod:`smt_dist.saves`). Call it on one rank.

    Args:
        model: after :func:`apply_selection`.
        folder: created if missing.
        deltas: (module, fp32 master) in the model's order, written one at a time, where the model's own copies are
            rounded or partitioned (see :meth:`smt_dist.engines.Engine.read_blocks`); default: the model's.
        card: extra lines for the model card.

    Raises:
        SMTError: the model has no blocks.
        RuntimeError: a tensor isn't complete, as a partitioned one wouldn't be: nothing is written.
        OSError: the folder can't be written, or the disk is full: what was there before still is.
    """
    if not sparse_layers(model):
        raise SMTError(f"{folder}: the model has no blocks to save")
    with saving(folder) as beside:
        write_adapter(model, beside, deltas, card)


def write_adapter(
    model: nn.Module, folder: Path, deltas: Iterable[tuple[str, torch.Tensor]] | None = None, card: str = ""
) -> None:
    """The files of :func:`save_adapter`, into a folder that is a part of something larger and saved with it."""
    layers = sparse_layers(model)
    selection: BlockSelection = model.smt_selection
    if deltas is None:
        deltas = ((name, layer.delta) for name, layer in layers.items())
    config = model.smt_config or config_of(selection)
    # One key only: safetensors writes several in a random order, and equal adapters should be equal files.
    metadata = {"base_fingerprint": model.smt_base_fingerprint}
    shapes = {name: delta_shape(selection, name) for name in layers}
    write_tensors(folder / BLOCKS_FILE, shapes, deltas, metadata)
    (folder / SELECTION_FILE).write_text(selection.to_json())
    (folder / CARD_FILE).write_text(_model_card(model, config, selection, card))
    (folder / CONFIG_FILE).write_text(config.to_json())


def load_adapter(
    model: nn.Module, folder: str | Path, dtype: torch.dtype = torch.float32, verify_base: bool = True
) -> Adapter:
    """Put an adapter's blocks into ``model``, in place; blocks that it has already are replaced.

    Args:
        model: the base that the adapter was trained on.
        folder: the adapter.
        dtype: of the blocks, as in :func:`apply_selection`.
        verify_base: compare the content fingerprint of the base.

    Raises:
        SMTError: the folder is incomplete or malformed, doesn't fit the model, or belongs to another base.
            The model is unchanged then, apart from blocks that it had.
    """
    adapter = read_adapter(folder)
    attach_adapter(model, adapter, str(folder), adapter.config, dtype, verify_base)
    return adapter


def read_adapter(folder: str | Path) -> Adapter:
    """Read an adapter folder, after comparing it with its manifest.

    Raises:
        SMTError: a file is missing, malformed or not what was saved, or a tensor is missing, extra, or of another shape
            or dtype.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise SMTError(f"{folder}: no such adapter folder")
    if (manifest := read_manifest(folder)) is None:
        logger.warning(
            "%s: has no %s: it is from an older version, or a copy that isn't complete; its form is checked, but "
            "damage to its values can't be seen",
            folder,
            MANIFEST_FILE,
        )
    else:
        verify(folder, manifest, (CONFIG_FILE, SELECTION_FILE, BLOCKS_FILE))
    config = SMTConfig.from_json_file(folder / CONFIG_FILE)
    selection = BlockSelection.from_json_file(folder / SELECTION_FILE)
    path = folder / BLOCKS_FILE
    check_tensors(
        path, read_header(path)[0], {name: delta_shape(selection, name) for name in selection.blocks}, SELECTION_FILE
    )
    tensors, metadata = read_tensors(path)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise SMTError(f"{path}: {name} is not finite (NaN or infinity): its training diverged")
    return Adapter(config, selection, tensors, metadata.get("base_fingerprint", ""))


def attach_adapter(
    model: nn.Module,
    adapter: Adapter,
    source: str,
    config: SMTConfig,
    dtype: torch.dtype,
    verify_base: bool = True,
    device: torch.device | None = None,
) -> None:
    """Put a read adapter's blocks into ``model``, in place; blocks that it has already are replaced.

    Args:
        model: as for :func:`load_adapter`.
        adapter: see :func:`read_adapter`.
        source: names the adapter in errors.
        config: recorded in the adapters that are saved from this model.
        dtype: of the blocks.
        verify_base: compare the content fingerprint of the base.
        device: of the blocks, as in :func:`apply_selection`.

    Raises:
        SMTError: as :func:`load_adapter`.
    """
    fingerprint = verify_base_model(model, adapter, source) if verify_base else None
    if sparse_layers(model):
        remove_blocks(model)
    apply_selection(model, adapter.selection, config, dtype, fingerprint=fingerprint, device=device)
    for name, layer in sparse_layers(model).items():
        with torch.no_grad():
            layer.delta.copy_(adapter.deltas[name])


def verify_base_model(model: nn.Module, adapter: Adapter, source: str) -> str:
    """Check that ``model`` is the base of ``adapter``; its fingerprint. Raises SMTError, naming the source."""
    modules = dict(base_modules(model))
    missing = [name for name in adapter.selection.blocks if name not in modules or not takes_blocks(modules[name])]
    if missing:
        raise SMTError(f"{source}: trained on another model: this one ({type(model).__name__}) has no {missing[0]}")
    try:
        fingerprint = base_fingerprint(model, adapter.selection)
    except SMTError as error:
        raise SMTError(f"{source}: trained on another model: {error}") from None
    verify_fingerprint(adapter, fingerprint, source)
    return fingerprint


def verify_fingerprint(adapter: Adapter, fingerprint: str, source: str) -> None:
    """Refuse a base by its :class:`smt_dist.model.Fingerprint`. Raises SMTError, naming the source."""
    if fingerprint != adapter.base_fingerprint:
        moved = adapter.config.warmup.mode == "full_ft"
        why = "it needs the base as its full fine-tuning warm-up moved it" if moved else "its weights differ from these"
        raise SMTError(f"{source}: trained on another base model (content fingerprint): {why}")


def delta_shape(selection: BlockSelection, name: str) -> tuple[int, int]:
    """The shape of a module's block tensor."""
    rows, cols = selection.block_size
    return len(selection.blocks[name]) * rows, cols


def config_of(selection: BlockSelection) -> SMTConfig:
    """What a selection amounts to that comes without its config: built by hand, or read from a file."""
    modules: dict[str, list[str]] = {}
    for module in selection.blocks:
        modules.setdefault(selection.groups.get(module, "selected"), []).append(module)
    groups = [
        GroupConfig(name=name, target_modules=names, blocks=sum(len(selection.blocks[module]) for module in names))
        for name, names in modules.items()
    ]
    return SMTConfig(block_size=selection.block_size, groups=groups)


def _model_card(model: nn.Module, config: SMTConfig, selection: BlockSelection, extra: str) -> str:
    front = json.dumps(["smt", "sparse-matrix-tuning"])
    moved = (
        "**It needs the moved base**: the warm-up ran full fine-tuning, so the blocks don't fit the original model.\n\n"
        if config.warmup.mode == "full_ft"
        else ""
    )
    return (
        f"---\nlibrary_name: smt_dist\ntags: {front}\n---\n\n# SMT adapter for {type(model).__name__}\n\n"
        f"{len(selection)} blocks of {selection.block_size[0]} x {selection.block_size[1]} in "
        f"{len(selection.blocks)} modules, {selection.parameters:,} parameters in fp32. Each is the difference to the "
        f"base's weight.\n\n{moved}"
        "```python\nimport smt_dist\nsmt_dist.load_adapter(model, 'this folder')   # model: its base\n"
        f"smt_dist.merge_blocks(model)                   # optional: an ordinary model\n```\n{extra}"
    )
