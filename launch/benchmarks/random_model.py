"""A Llama of any size with random weights, written file by file: it never lies in memory whole."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from smt_dist.errors import SMTError
from smt_dist.files import replace_file
from smt_dist.sparse.layer_names import layer_key

SPECIAL = ["<pad>", "<bos>", "<eos>"]


def write_random_llama(
    folder: Path,
    *,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    layers: int,
    heads: int,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    progress: bool = False,
) -> None:
    """Write a model folder, with a tokenizer whose words are ``t3``, ``t4``, ... and one file a layer.

    A folder that is complete is left alone; one that was cut short is written anew.

    Args:
        folder: created.
        vocab_size: tokens; the head is not tied.
        hidden_size: features of a layer's input.
        intermediate_size: features inside the MLP.
        layers: number of layers.
        heads: attention heads.
        dtype: of the weights.
        seed: of the weights.
        progress: show a progress bar.

    Raises:
        SMTError: too few tokens, or heads that don't divide the hidden size.
    """
    _refuse_shape(vocab_size, hidden_size, heads)
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.exists():  # written last
        return
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        architectures=["LlamaForCausalLM"],
        dtype=dtype,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config.save_pretrained(folder)
    _tokenizer(vocab_size).save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    files: dict[str, list[str]] = {}
    for name in shapes:
        files.setdefault(f"model-{layer_key(name).replace('.', '-')}.safetensors", []).append(name)
    generator = torch.Generator().manual_seed(seed)
    for file, names in tqdm(files.items(), desc="random weights", unit="file", disable=not progress):
        weights = {name: _weight(shapes[name], config.initializer_range, dtype, generator) for name in names}
        save_file(weights, folder / file, metadata={"format": "pt"})
    content = {"metadata": {}, "weight_map": {name: file for file, names in files.items() for name in names}}
    replace_file(index, lambda path: path.write_text(json.dumps(content)))


def _refuse_shape(vocab_size: int, hidden_size: int, heads: int) -> None:
    if vocab_size <= len(SPECIAL):
        raise SMTError(f"vocab_size {vocab_size}: must be above {len(SPECIAL)}, for the special tokens")
    if hidden_size % heads or hidden_size // heads % 2:
        raise SMTError(f"heads {heads}: must cut the hidden size {hidden_size} into equal, even parts")


def _weight(shape: torch.Size, deviation: float, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1:  # of a norm
        return torch.ones(shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype).normal_(0, deviation, generator=generator)


def _tokenizer(size: int) -> PreTrainedTokenizerFast:
    words = [*SPECIAL, *(f"t{number}" for number in range(len(SPECIAL), size))]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
