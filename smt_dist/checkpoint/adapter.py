"""Save, check and load adapter folders, the small result of a training.

``smt_config.json``, ``smt_selection.json``, ``smt_blocks.safetensors`` (one fp32 tensor a module: the deltas'
masters), ``README.md`` (model card) and ``smt_manifest.json`` (sizes and checksums). Nothing is pickled, and nothing
depends on engine or world size.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from smt_dist.checkpoint.atomic import MANIFEST_FILE, VerifiedFolder, read_manifest, saving, verify
from smt_dist.config import GroupConfig, SMTConfig, parse_model
from smt_dist.errors import SMTError
from smt_dist.files import check_tensors, read_header, read_tensors, read_text, write_tensors
from smt_dist.sparse.blocks import BlockSelection, rearrange, without
from smt_dist.sparse.fingerprint import base_fingerprint
from smt_dist.sparse.forms import Form
from smt_dist.sparse.surgery import (
    add_frozen_blocks,
    apply_selection,
    ever_trained_selection,
    frozen_layers,
    remove_blocks,
    sparse_layers,
)
from smt_dist.sparse.targets import base_modules, takes_blocks

logger = logging.getLogger(__name__)

CONFIG_FILE = "smt_config.json"
SELECTION_FILE = "smt_selection.json"
BLOCKS_FILE = "smt_blocks.safetensors"
ACTIVE_FILE = "smt_active.json"  # after a re-selection only: the blocks that are still trained
CARD_FILE = "README.md"


class ActiveBlocks(BaseModel):
    """Name the blocks of an adapter that are trained; the others are frozen.

    Attributes:
        step: the optimizer step of the last re-selection; 0: of an earlier run, whose adapter this one continues.
        selection: the trained blocks.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    step: Annotated[int, Field(strict=True, ge=0)]
    selection: BlockSelection


class Adapter(NamedTuple):
    """Hold the content of an adapter folder.

    Attributes:
        config: the config it was trained with.
        selection: its blocks.
        deltas: module name -> fp32 ``[blocks * block_rows, block_cols]`` on the CPU.
        base_fingerprint: of the base it was trained on (:func:`smt_dist.sparse.fingerprint.base_fingerprint`).
        active: after a re-selection, which blocks are still trained; None: all.
    """

    config: SMTConfig
    selection: BlockSelection
    deltas: dict[str, torch.Tensor]
    base_fingerprint: str
    active: ActiveBlocks | None = None

    @property
    def trained(self) -> BlockSelection:
        """Return the blocks that training goes on with."""
        return self.active.selection if self.active is not None else self.selection


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    deltas: Iterable[tuple[str, torch.Tensor]] | None = None,
    card: str = "",
) -> None:
    """Write ``model``'s blocks as an adapter folder; call it on one rank.

    It is saved whole or not at all (:mod:`smt_dist.checkpoint.atomic`).

    Args:
        model: after :func:`apply_selection`.
        folder: created if missing.
        deltas: (module, fp32 master) in the model's order, written one at a time, where the model's own copies are
            rounded or partitioned (see :meth:`smt_dist.engines.base.Engine.read_blocks`); default: the model's.
        card: extra lines for the model card.

    Raises:
        SMTError: the model has no blocks.
        RuntimeError: a tensor isn't complete, as a partitioned one wouldn't be: nothing is written.
        OSError: the folder can't be written, or the disk is full: what was there before still is.
    """
    if not sparse_layers(model):
        raise SMTError(f"{folder}: the model has no blocks to save")
    with saving(folder) as beside:
        write_blocks_of(model, beside, deltas, card)


def write_blocks_of(
    model: nn.Module, folder: Path, deltas: Iterable[tuple[str, torch.Tensor]] | None = None, card: str = ""
) -> None:
    """Write the files of :func:`save_adapter` into a folder that is saved as part of another."""
    ever_trained, active, layers = ever_trained_selection(model), model.smt.selection, sparse_layers(model)
    if deltas is None:
        deltas = ((name, layer.read_delta()) for name, layer in layers.items())
    step = model.smt.reselected_at
    adapter = Adapter(
        config=model.smt.config or config_of(ever_trained),
        selection=ever_trained,
        deltas={},
        base_fingerprint=model.smt.base_fingerprint,
        active=None if step is None else ActiveBlocks(step=step, selection=active),
    )
    # A selection that was read from a file may list its modules in another order than the model has them.
    order = list(layers)
    if frozen_layers(model):
        order, deltas = list(ever_trained.blocks), _with_frozen(model, ever_trained, active, deltas)
    write_adapter(folder, adapter, order, deltas, model_card(model, adapter.config, ever_trained, card))


def write_adapter(
    folder: Path, adapter: Adapter, order: Iterable[str], deltas: Iterable[tuple[str, torch.Tensor]], card: str
) -> None:
    """Write an adapter's files into a folder that is saved as part of another.

    Args:
        folder: empty, or without an :data:`ACTIVE_FILE`.
        adapter: all but its ``deltas``.
        order: the selection's modules, as ``deltas`` brings them.
        deltas: (module, fp32 values), written one at a time.
        card: the model card's text.
    """
    selection, active = adapter.selection, adapter.active
    # One key only: safetensors writes several in a random order, and equal adapters should be equal files.
    metadata = {"base_fingerprint": adapter.base_fingerprint}
    shapes = {name: delta_shape(selection, name) for name in order}
    write_tensors(folder / BLOCKS_FILE, shapes, deltas, metadata)
    (folder / SELECTION_FILE).write_text(selection.to_json())
    if active is not None:
        (folder / ACTIVE_FILE).write_text(active.model_dump_json() + "\n")
    (folder / CARD_FILE).write_text(card)
    (folder / CONFIG_FILE).write_text(adapter.config.to_json())


def _with_frozen(
    model: nn.Module, ever_trained: BlockSelection, active: BlockSelection, deltas: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield each module's trained and frozen masters together, one module at a time."""
    frozen, trained = frozen_layers(model), iter(deltas)
    kept = without(ever_trained, active)
    for name in ever_trained.blocks:
        whole = torch.zeros(delta_shape(ever_trained, name))
        if name in active.blocks:
            found, delta = next(trained)
            assert found == name, f"{found} came where {name} was expected"
            whole += rearrange(delta, active, ever_trained, name)
        if name in frozen:
            whole += rearrange(frozen[name].master, kept, ever_trained, name)
        yield name, whole


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
    if verify_base:
        verify_base_model(model, adapter, str(folder))
    # Blocks that a re-selection froze are ordinary blocks here; the fingerprint is that of the base that is there.
    fingerprint = adapter.base_fingerprint if verify_base else ""
    attach_adapter(model, adapter._replace(active=None, base_fingerprint=fingerprint), dtype)
    return adapter


def read_adapter(source: str | Path | VerifiedFolder) -> Adapter:
    """Read an adapter folder, after comparing it with its manifest.

    Args:
        source: the folder; one that is known to be what was saved isn't read for that again.

    Raises:
        SMTError: a file is missing, malformed or not what was saved, or a tensor is missing, extra, or of another shape
            or dtype.
    """
    folder = Path(source)
    if not folder.is_dir():
        raise SMTError(f"{folder}: no such adapter folder")
    _compare_with_manifest(source)
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
    return Adapter(config, selection, tensors, metadata.get("base_fingerprint", ""), read_active(folder, selection))


def _compare_with_manifest(source: str | Path | VerifiedFolder) -> None:
    folder, is_verified = Path(source), isinstance(source, VerifiedFolder)
    if (manifest := source.manifest if is_verified else read_manifest(folder)) is None:
        logger.warning(
            "%s: has no %s: it is from an older version, or a copy that isn't complete; its form is checked, but "
            "damage to its values can't be seen",
            folder,
            MANIFEST_FILE,
        )
        return
    if is_verified:
        source.check_unchanged()
    active = {ACTIVE_FILE} if ACTIVE_FILE in manifest.files or (folder / ACTIVE_FILE).exists() else set()
    verify(folder, manifest, {CONFIG_FILE, SELECTION_FILE, BLOCKS_FILE} | active, checksums=not is_verified)


def trained_deltas(adapter: Adapter) -> Mapping[str, torch.Tensor]:
    """Map modules to the fp32 values that training goes on with, made one at a time when asked."""
    return adapter.deltas if adapter.active is None else _TrainedDeltas(adapter)


class _TrainedDeltas(Mapping[str, torch.Tensor]):
    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter

    def __getitem__(self, name: str) -> torch.Tensor:
        return rearrange(self._adapter.deltas[name], self._adapter.selection, self._adapter.trained, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapter.trained.blocks)

    def __len__(self) -> int:
        return len(self._adapter.trained.blocks)


def read_active(folder: Path, ever_trained: BlockSelection) -> ActiveBlocks | None:
    """Read which of an adapter's blocks are still trained; None if it doesn't say: all.

    Raises:
        SMTError: the file is malformed, or names blocks that aren't the adapter's.
    """
    path = folder / ACTIVE_FILE
    if not path.exists():
        return None
    active: ActiveBlocks = parse_model(ActiveBlocks, read_text(path), str(path))
    for name, blocks in active.selection.blocks.items():
        known = set(blocks) <= set(ever_trained.blocks.get(name, ()))
        if not known or active.selection.block_size != ever_trained.block_size:
            raise SMTError(f"{path}: trains blocks of {name} that {SELECTION_FILE} doesn't have")
    return active


def attach_adapter(
    model: nn.Module,
    adapter: Adapter,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    auto_form: Form = "additive",
) -> None:
    """Put an adapter's blocks into ``model``, in place; blocks that it has already are replaced.

    Args:
        model: the adapter's base (:func:`verify_base_model`).
        adapter: its ``active`` blocks are trained, the others stay frozen; an empty fingerprint is worked out.
        dtype: of the blocks, as in :func:`apply_selection`.
        device: of the blocks, as in :func:`apply_selection`.
        auto_form: as in :func:`apply_selection`.

    Raises:
        SMTError: the selection doesn't fit the model.
    """
    remove_blocks(model)
    ever_trained, trained, deltas = adapter.selection, adapter.trained, trained_deltas(adapter)
    # Of the base under all blocks, frozen ones included: adapters saved from this model are compared with it.
    fingerprint = adapter.base_fingerprint or None
    if fingerprint is None and adapter.active is not None:
        fingerprint = base_fingerprint(model, ever_trained)
    if (frozen := without(ever_trained, trained)) is not None:
        masters = {name: rearrange(adapter.deltas[name], ever_trained, frozen, name) for name in frozen.blocks}
        add_frozen_blocks(model, frozen, masters, dtype, device, (adapter.config.form, auto_form))
    apply_selection(model, trained, adapter.config, dtype, False, fingerprint, device, auto_form)
    model.smt.frozen_groups = dict(ever_trained.groups)
    model.smt.reselected_at = adapter.active.step if adapter.active is not None else None
    for name, layer in sparse_layers(model).items():
        layer.write_delta(deltas[name])


def verify_base_model(model: nn.Module, adapter: Adapter, source: str) -> None:
    """Check that ``model`` is the base of ``adapter``. Raises SMTError, naming the source."""
    modules = dict(base_modules(model))
    missing = [name for name in adapter.selection.blocks if name not in modules or not takes_blocks(modules[name])]
    if missing:
        raise SMTError(f"{source}: trained on another model: this one ({type(model).__name__}) has no {missing[0]}")
    try:
        fingerprint = base_fingerprint(model, adapter.selection)
    except SMTError as error:
        raise SMTError(f"{source}: trained on another model: {error}") from None
    verify_fingerprint(adapter, fingerprint, source)


def verify_fingerprint(adapter: Adapter, fingerprint: str, source: str) -> None:
    """Refuse a base with another fingerprint. Raises SMTError, naming the source.

    See :class:`smt_dist.sparse.fingerprint.Fingerprint`.
    """
    if fingerprint != adapter.base_fingerprint:
        moved = adapter.config.warmup.mode == "full_ft"
        why = "it needs the base as its full fine-tuning warm-up moved it" if moved else "its weights differ from these"
        raise SMTError(f"{source}: trained on another base model (content fingerprint): {why}")


def delta_shape(selection: BlockSelection, name: str) -> tuple[int, int]:
    """Return the shape of a module's block tensor."""
    rows, cols = selection.block_size
    return len(selection.blocks[name]) * rows, cols


def config_of(selection: BlockSelection | None) -> SMTConfig:
    """Make the config that a selection without one amounts to; without a selection, the default.

    Args:
        selection: built by hand, or read from a file.
    """
    if selection is None:
        return SMTConfig()
    modules: dict[str, list[str]] = {}
    for module in selection.blocks:
        modules.setdefault(selection.groups.get(module, "selected"), []).append(module)
    groups = [
        GroupConfig(name=name, target_modules=names, blocks=sum(len(selection.blocks[module]) for module in names))
        for name, names in modules.items()
    ]
    return SMTConfig(block_size=selection.block_size, groups=groups)


def model_card(model: nn.Module, config: SMTConfig, selection: BlockSelection, extra: str) -> str:
    """Return the text of an adapter's README.md, with ``extra`` lines at its end."""
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
