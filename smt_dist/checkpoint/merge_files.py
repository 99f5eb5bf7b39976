"""Merge an adapter into a checkpoint on disk, one weight at a time.

So a model of 70B is merged on a small host.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from smt_dist.checkpoint.adapter import Adapter, read_adapter, verify_fingerprint
from smt_dist.errors import SMTError, first_line
from smt_dist.models.folder import INDEX_FILE, SINGLE_FILE, check_model_folder, empty_model, read_config, weight_files
from smt_dist.sparse.blocks import read_blocks, summed_blocks, write_blocks
from smt_dist.sparse.fingerprint import Fingerprint
from smt_dist.sparse.targets import takes_blocks, tied_parameter_names, weight_shape

_WEIGHT_SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf", ".bin.index.json")


@dataclass(frozen=True)
class MergeReport:
    """Describe a finished merge.

    Attributes:
        weights: merged weights.
        parameters: merged elements.
        lost: the norm of what rounding to the output's dtype took from the deltas, as a share of their norm.
    """

    weights: int
    parameters: int
    lost: float


def merge_adapter_files(
    model_name_or_path: str | Path,
    adapter_folder: str | Path,
    output_folder: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 2 * 1024**3,
    progress: bool = False,
) -> MergeReport:
    """Write the checkpoint with the blocks added: an ordinary Hugging Face model folder.

    Every selected element is the rounding of fp32(base) + fp32(delta); every other is the base's own bits
    (with ``dtype``: their rounding). Needs memory for one output shard and one weight.

    Args:
        model_name_or_path: the base: a folder with safetensors files, or a hub name.
        adapter_folder: the adapter.
        output_folder: must not hold anything yet; appears when it is complete.
        dtype: of the floating-point weights written; default: as they are.
        max_shard_bytes: of one output file.
        progress: show a bar.

    Raises:
        SMTError: base or adapter can't be read or don't belong together, or the output exists.
    """
    output = Path(output_folder)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise SMTError(f"{output}: exists already and isn't empty")
    adapter = read_adapter(adapter_folder)
    folder = _find_folder(model_name_or_path)
    check_model_folder(str(folder))
    base = _BaseFiles(folder)
    plan = _Plan(base, adapter)
    _verify_fingerprint(plan, adapter_folder)

    try:
        return _write(plan, output, dtype, max_shard_bytes, progress)
    except (OSError, SafetensorError) as error:
        raise SMTError(f"{output}: can't be written ({first_line(error)})") from None


def _write(plan: _Plan, output: Path, dtype: torch.dtype | None, max_shard_bytes: int, progress: bool) -> MergeReport:
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        report = _write_weights(plan, folder, dtype, max_shard_bytes, progress)
        _copy_other_files(plan.base.folder, folder, dtype, untied=plan.untied)
        if output.exists():
            output.rmdir()
        folder.rename(output)
    return report


class _BaseFiles:
    """Read the base's tensors by name, one at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = weight_files(folder)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> list[str]:
        """Return the names of all tensors, file by file."""
        return list(self._files)

    def read(self, name: str) -> torch.Tensor:
        try:
            with safe_open(self._files[name], framework="pt") as file:
                return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise SMTError(f"{self._files[name]}: {name} can't be read ({error})") from None


class _Plan:
    """Map each tensor of the base to the module whose blocks it gets."""

    def __init__(self, base: _BaseFiles, adapter: Adapter) -> None:
        self.base, self.adapter = base, adapter
        self.modules: dict[str, str] = {}  # tensor name -> module
        self.copied: dict[str, str] = {}  # tensor to add -> the tied tensor that it starts as
        self.untied = False
        model = empty_model(base.folder, read_config(base.folder))
        for module in adapter.selection.blocks:
            self._place(model, module)

    def _place(self, model: nn.Module, module: str) -> None:
        try:
            layer = model.get_submodule(module)
        except AttributeError:
            raise SMTError(f"{self.base.folder}: {type(model).__name__} has no module {module}") from None
        if not takes_blocks(layer):
            raise SMTError(f"{self.base.folder}: {module} is a {type(layer).__name__}, which has no blocks")
        self.adapter.selection.grid(module, weight_shape(layer))
        prefix = f"{model.base_model_prefix}."
        names = [f"{module}.weight", f"{module}.weight".removeprefix(prefix)]
        found = next((name for name in names if name in self.base), None)
        tied = tied_parameter_names(model, module)
        if tied and not self.adapter.config.untie:
            raise SMTError(f'{module} is tied to {tied[0]}; the adapter\'s config must say "untie": true')
        partners = [name for other in tied for name in (other, other.removeprefix(prefix))]
        partner = next((name for name in partners if name in self.base), None)
        if found is None and partner is None:
            raise SMTError(f"{self.base.folder}: has no tensor {names[0]}")
        # A tie is stored under one of its names; after the merge both must be there, with values of their own.
        if found is None:
            found = names[0]
            self.copied[found] = partner
        elif tied and partner is None:
            self.copied[tied[0]] = found
        self.untied |= bool(tied)
        self.modules[found] = module

    def names(self) -> list[str]:
        """Return the names of the output's tensors."""
        return [*self.base.names(), *self.copied]

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor as it was before the merge."""
        return self.base.read(self.copied.get(name, name))


def _verify_fingerprint(plan: _Plan, adapter_folder: str | Path) -> None:
    selection = plan.adapter.selection
    tensor_of = {module: name for name, module in plan.modules.items()}
    fingerprint = Fingerprint(selection)
    for module in selection.blocks:
        weight = plan.read(tensor_of[module])
        fingerprint.add(module, weight, tuple(weight.shape))
    verify_fingerprint(plan.adapter, fingerprint.hexdigest(), str(adapter_folder))


def _write_weights(
    plan: _Plan, folder: Path, dtype: torch.dtype | None, max_shard_bytes: int, progress: bool
) -> MergeReport:
    weight_map: dict[str, str] = {}
    shards: list[Path] = []
    lost = total = 0.0
    pending: dict[str, torch.Tensor] = {}
    size = 0

    def flush() -> None:
        if pending:
            shards.append(folder / f"shard-{len(shards) + 1}")
            save_file(pending, shards[-1], {"format": "pt"})
            weight_map.update(dict.fromkeys(pending, shards[-1].name))
            pending.clear()

    written = 0
    for name in tqdm(plan.names(), desc="merging", unit="weight", disable=not progress):
        tensor, lost_here, norm_here = _merged(plan, name, dtype)
        lost, total = lost + lost_here, total + norm_here
        bytes_here = tensor.numel() * tensor.element_size()
        if size + bytes_here > max_shard_bytes:
            flush()
            size = 0
        pending[name] = tensor
        size, written = size + bytes_here, written + bytes_here
    flush()
    _name_shards(folder, shards, weight_map, written)
    return MergeReport(len(plan.modules), plan.adapter.selection.parameters, (lost / total) ** 0.5 if total else 0.0)


def _merged(plan: _Plan, name: str, dtype: torch.dtype | None) -> tuple[torch.Tensor, float, float]:
    """Compute a tensor of the output.

    Returns:
        The tensor, and the squared norms of what rounding lost of its deltas and of the deltas.
    """
    tensor = plan.read(name)
    target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    if name not in plan.modules:
        return tensor.to(target).contiguous(), 0.0, 0.0
    module = plan.modules[name]
    blocks = plan.adapter.selection.blocks[module]
    grid = plan.adapter.selection.grid(module, tuple(tensor.shape))
    delta = plan.adapter.deltas[module]
    exact = summed_blocks(read_blocks(tensor, grid, blocks), delta)
    rounded = exact.to(target)
    result = tensor.to(target, copy=True)
    write_blocks(result, grid, blocks, rounded)
    lost = (rounded.float() - exact).square().sum().item()
    return result.contiguous(), lost, delta.square().sum().item()


def _name_shards(folder: Path, shards: list[Path], weight_map: dict[str, str], total: int) -> None:
    """Give the shards their usual names, which hold their number."""
    if len(shards) == 1:
        shards[0].rename(folder / SINGLE_FILE)
        return
    names = {}
    for index, shard in enumerate(shards, start=1):
        names[shard.name] = f"model-{index:05d}-of-{len(shards):05d}.safetensors"
        shard.rename(folder / names[shard.name])
    content = {
        "metadata": {"total_size": total},
        "weight_map": {name: names[file] for name, file in sorted(weight_map.items())},
    }
    (folder / INDEX_FILE).write_text(json.dumps(content, indent=2))


def _copy_other_files(source: Path, target: Path, dtype: torch.dtype | None, untied: bool) -> None:
    for path in _other_files(source):
        shutil.copyfile(path, target / path.name)
    config_path = target / "config.json"
    config = json.loads(config_path.read_text())
    if dtype is not None:
        config.pop("torch_dtype", None)  # the name before transformers 4.56
        config["dtype"] = str(dtype).removeprefix("torch.")
    if untied:
        config["tie_word_embeddings"] = False
    config_path.write_text(json.dumps(config, indent=2))


def _other_files(folder: Path) -> Iterator[Path]:
    """List configs and tokenizer: all files of the folder but weights and hidden ones."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.endswith(_WEIGHT_SUFFIXES) and not path.name.startswith("."):
            yield path


def _find_folder(model_name_or_path: str | Path) -> Path:
    if Path(model_name_or_path).is_dir():
        return Path(model_name_or_path)
    try:
        return Path(snapshot_download(str(model_name_or_path), ignore_patterns=["*.bin", "*.pth", "*.gguf"]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise SMTError(f"{model_name_or_path}: no such folder, nor a model on the hub ({first_line(error)})") from None
