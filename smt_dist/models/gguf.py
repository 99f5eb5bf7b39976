"""Convert a GGUF file to an ordinary Hugging Face folder, once.

A GGUF model that is loaded directly is still marked as quantised, although its weights are plain floats: ``Trainer``
then refuses to train it, ZeRO-3 to shard it and ``save_pretrained`` to save it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from smt_dist.errors import SMTError, first_line
from smt_dist.files import save_tokenizer
from smt_dist.models.gguf_header import check_gguf_header


def default_cache_dir() -> Path:
    """Return ``$SMT_DIST_CACHE``, or ``smt_dist`` in the user's cache folder."""
    if chosen := os.environ.get("SMT_DIST_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "smt_dist"


def find_gguf_file(model_name_or_path: str | None, gguf_file: str | Path) -> Path:
    """Return the path of ``gguf_file``, as given or in the folder ``model_name_or_path``.

    Raises:
        SMTError: there is no such file in either place.
    """
    candidates = [Path(gguf_file)] + ([Path(model_name_or_path) / gguf_file] if model_name_or_path else [])
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise SMTError(f"gguf_file: no such file: {' or '.join(map(str, candidates))}")


def dequantize_gguf(
    gguf_file: str | Path, cache_dir: str | Path | None = None, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Convert the model and tokenizer of ``gguf_file`` to safetensors, unless done before.

    Args:
        gguf_file: any architecture that transformers can read from GGUF.
        cache_dir: the parent of the new folder (default: :func:`default_cache_dir`). The folder is named by the file's
            name, the first 16 hexadecimal digits of its SHA-256, and the dtype.
        dtype: of the weights written.

    Returns:
        The folder, always complete: it is renamed to its name only when everything is in it. If two processes convert
        the same file at once, one of the two equal results is kept.

    Raises:
        SMTError: the file is missing, isn't GGUF, is damaged, or has an unknown architecture; or the folder can't be
            written.
    """
    gguf_file = Path(gguf_file)
    digest = _check_and_hash(gguf_file)
    cache_dir = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    folder = cache_dir / f"{gguf_file.stem}-{digest[:16]}-{str(dtype).removeprefix('torch.')}"
    if folder.is_dir():
        return folder
    temporary = cache_dir / f".{folder.name}-{uuid.uuid4().hex[:8]}"
    try:
        temporary.mkdir(parents=True)
        _convert(gguf_file, temporary, dtype)
        _publish(temporary, folder)
    except OSError as error:
        raise SMTError(f"{folder}: can't be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _check_and_hash(gguf_file: Path) -> str:
    check_gguf_header(gguf_file)
    try:
        with gguf_file.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SMTError(f"{gguf_file}: can't be read: {error.strerror}") from error


def _convert(gguf_file: Path, target: Path, dtype: torch.dtype) -> None:
    try:
        source = {"pretrained_model_name_or_path": str(gguf_file.parent), "gguf_file": gguf_file.name}
        source["trust_remote_code"] = False  # else transformers asks at the terminal, and waits
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(
            **source, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
        )
    except ImportError as error:
        raise SMTError(f"{gguf_file}: reading GGUF needs two more packages: pip install gguf accelerate") from error
    # The readers don't check the bytes they parse, so a damaged file raises any type of exception.
    except Exception as error:
        raise SMTError(f"{gguf_file}: can't be read as a GGUF model: {first_line(error)}") from error
    _remove_quantization_marks(model)
    try:
        model.save_pretrained(target)
        save_tokenizer(tokenizer, target)
    except SafetensorError as error:  # a full disk
        raise OSError(str(error)) from None


def _remove_quantization_marks(model: PreTrainedModel) -> None:
    if quantizer := getattr(model, "hf_quantizer", None):
        quantizer.remove_quantization_config(model)


def _publish(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError:
        # Another process was faster. Its content is equal, because the name contains the file's hash.
        if not folder.is_dir():
            raise
