"""Load a base and its tokenizer as data: checked before allocation, never unpickled or run."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from smt_dist.distributed import raise_on_any_rank
from smt_dist.errors import RankError, SMTError, whole_message
from smt_dist.files import TensorKind, parse_json_object, read_header, read_text, shorten

logger = logging.getLogger(__name__)

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
# The config keys that make a model large: each is at most the number of elements of the largest weight.
_SIZES = (
    *("hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("n_embd", "n_inner", "n_head", "d_model", "d_ff", "ffn_dim", "num_heads"),
)
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def weight_files(folder: Path) -> dict[str, Path]:
    """Return tensor name -> safetensors file of a model folder.

    Raises:
        SMTError: there are no safetensors files, the index is damaged, or it names a file that isn't in the folder.
    """
    index = folder / INDEX_FILE
    if not index.exists():
        if not (folder / SINGLE_FILE).exists():
            raise SMTError(
                f"{folder}: has neither {SINGLE_FILE} nor {INDEX_FILE}; pickled weights (pytorch_model.bin) aren't "
                "read, as they could run code: convert them to safetensors first, in an isolated environment"
            )
        return dict.fromkeys(read_header(folder / SINGLE_FILE)[0], folder / SINGLE_FILE)
    files = parse_json_object(read_text(index), str(index)).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise SMTError(f"{index}: damaged weights or index (it has no weight_map)")
    for name, file in files.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise SMTError(f"{index}: {shorten(name)}: {shorten(repr(file))} is not a safetensors file of this folder")
    for file in sorted(set(files.values())):
        if not (folder / file).is_file():
            raise SMTError(f"{folder / file}: No such file; {INDEX_FILE} names it")
    return {name: folder / file for name, file in files.items()}


def check_model_folder(source: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Check a base before it is loaded.

    Ranks that load together should run this first, so that all of them fail together.

    Args:
        source: folder or hub name.
        trust_remote_code: whether the config's own code may run.

    Returns:
        The model's config.

    Raises:
        SMTError: there is no such folder or no model config, or the folder's weights are damaged or don't fit the
            config.
    """
    if not Path(source).is_dir() and (not _HUB_NAME.fullmatch(source) or source.startswith(".")):
        raise SMTError(f"{source}: no such folder")
    config = read_config(source, trust_remote_code)
    if Path(source).is_dir():
        kinds = _check_sizes(Path(source), config.to_dict())
        if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:  # not the model's own code
            _check_shapes(Path(source), config, kinds)
    return config


def read_config(source: str | Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Load a model's config.

    Raises:
        SMTError: it can't be read, or asks for code that isn't part of transformers; names the source.
    """
    try:
        content, _ = PreTrainedConfig.get_config_dict(source)
        # Without trust_remote_code, transformers would ask at the terminal whether to run code, and wait.
        config = AutoConfig.from_pretrained(source, trust_remote_code=bool(trust_remote_code))
    except Exception as error:  # a config's own checks raise any type
        raise SMTError(f"{source}: neither a model folder nor a model on the hub ({whole_message(error)})") from None
    for key, value in _nested(content):
        # transformers 5.23 with the kernels package downloads and runs a repository that is named here.
        if "attn_implementation" in key and not trust_remote_code and "/" in str(value):
            raise SMTError(
                f"{source}: its config.json asks for the attention code of {shorten(repr(value))}: give "
                "--trust_remote_code if you trust both"
            )
    return config


def load_tokenizer(source: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a base's tokenizer.

    Raises:
        SMTError: it can't be loaded; names the source.
    """
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=bool(trust_remote_code))
    except Exception as error:  # the tokenizers library raises bare exceptions
        raise SMTError(f"{source}: its tokenizer can't be loaded ({whole_message(error)})") from None


def load_causal_lm(
    source: str | Path, dtype: torch.dtype | str, trust_remote_code: bool = False, **options: Any
) -> PreTrainedModel:
    """Load a base from safetensors files, and check that it has all weights; collective.

    Args:
        source: folder or hub name, after :func:`check_model_folder`.
        dtype: of the weights; ``auto``: the config's.
        trust_remote_code: run code that comes with the model.
        **options: of ``from_pretrained``.

    Raises:
        RankError: loading failed on this rank; perhaps not on the others.
        SMTError: a weight is missing (transformers would initialise it at random) or of another shape; on all ranks.
    """
    try:
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            trust_remote_code=bool(trust_remote_code),
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
            **options,
        )
    except Exception as error:  # parsers of other formats raise any type
        raise RankError(f"{source}: can't be loaded as a causal language model ({whole_message(error)})") from None
    raise_on_any_rank(lambda: _check_loading_info(source, loading_info), "loading the base")
    return model


def _check_loading_info(source: str | Path, loading_info: dict[str, Any]) -> None:
    if loading_info["mismatched_keys"]:
        name, saved, wanted = min(loading_info["mismatched_keys"])
        raise SMTError(f"{source}: {name} is {tuple(saved)}, but its config.json asks for {tuple(wanted)}")
    if missing := loading_info["missing_keys"]:
        raise SMTError(
            f"{source}: {min(missing)} isn't in its files ({len(missing)} weights are missing): transformers would "
            "initialise them at random"
        )
    if loading_info["unexpected_keys"]:
        names = sorted(loading_info["unexpected_keys"])
        logger.warning("%s: %d weights aren't used by the model, such as %s", source, len(names), shorten(names[0]))


def empty_model(source: str | Path, config: PreTrainedConfig) -> nn.Module:
    """Make the unsharded model on the meta device, with names, shapes and ties but no weights.

    Raises:
        SMTError: no causal language model has this config; names the source.
    """
    config = copy.deepcopy(config)
    config._attn_implementation = "eager"  # the only one without requirements
    try:
        # Not from_config: under ZeRO-3 that would partition the model over all ranks.
        with torch.device("meta"):
            return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    except Exception as error:  # wrong config values raise any type
        raise SMTError(f"{source}: not a causal language model's folder ({whole_message(error)})") from None


def _check_shapes(folder: Path, config: PreTrainedConfig, kinds: dict[str, TensorKind]) -> None:
    """Refuse weights of another size than the config's, before a rank's error hangs the others.

    Raises:
        SMTError: names the first such weight.
    """
    if getattr(config, "quantization_config", None) is not None:
        return  # packed weights have another size than the layer
    model = empty_model(folder, config)
    for name, parameter in model.named_parameters():
        kind = kinds.get(name) or kinds.get(name.removeprefix(f"{model.base_model_prefix}."))
        # Compare elements, not shapes: some weights are transposed when they are loaded.
        if kind is not None and torch.Size(kind.shape).numel() != parameter.numel():
            raise SMTError(f"{folder}: {name} is {kind.shape}, but its config.json asks for {tuple(parameter.shape)}")


def _check_sizes(folder: Path, config: dict[str, Any]) -> dict[str, TensorKind]:
    """Read the files' headers, and refuse a config that is far larger, before it is allocated.

    Returns:
        Tensor name -> shape and dtype.

    Raises:
        SMTError: a file is missing or damaged, or the config asks for more than the weights can hold.
    """
    files = weight_files(folder)
    kinds: dict[str, TensorKind] = {}
    for file in sorted(set(files.values())):
        kinds |= read_header(file)[0]
    if absent := sorted(files.keys() - kinds.keys()):
        raise SMTError(f"{files[absent[0]]}: has no tensor {shorten(absent[0])}, which {INDEX_FILE} names")
    largest = max((torch.Size(kind.shape).numel() for kind in kinds.values()), default=0)
    for key, value in _nested(config):
        limit = largest if key in _SIZES else len(kinds) if key in _DEPTHS else None
        if limit is not None and isinstance(value, int) and value > limit:
            raise SMTError(f"{folder / 'config.json'}: {key} is {value:,}: more than the folder's weights can hold")
    return kinds


def _nested(config: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        yield key, value
        if isinstance(value, dict):
            yield from _nested(value)
