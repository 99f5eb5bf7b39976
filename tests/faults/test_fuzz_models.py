"""Model folders, GGUF files and data rows, with bytes flipped, cut, moved and added: a result or one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import make_model
from damage import BOMBS, mutations, outcome
from harness import launch
from programs import ROWS, write_json
from test_gguf import write_gguf
from tiers import slow
from tiny_tokenizer import make_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from smt_dist.data.dataset import build_dataset
from smt_dist.data.rows import read_rows
from smt_dist.evaluation import make_items
from smt_dist.models.folder import check_model_folder, load_causal_lm, load_tokenizer
from smt_dist.models.gguf import dequantize_gguf
from smt_dist.models.gguf_header import check_gguf_header


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A model folder in two files with an index, and its tokenizer."""
    folder = tmp_path_factory.mktemp("fuzz") / "model"
    make_model("llama", vocab_size=264).save_pretrained(folder, max_shard_size="40KB")
    make_tokenizer().save_pretrained(folder)
    return folder


def read_base(folder: Path) -> None:
    check_model_folder(str(folder))
    load_tokenizer(folder)
    load_causal_lm(folder, torch.float32)


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors.index.json", "model-00001-of-*", "tokenizer.json", "tokenizer_config.json"],
)
@pytest.mark.parametrize("count", [3, pytest.param(12, marks=slow)])
def test_mutated_model_folder_is_refused_or_read(base, tmp_path, name, count):
    """transformers, tokenizers and safetensors raise anything at all, and draw weights that are missing at random."""
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    (path,) = folder.glob(name)
    original = path.read_bytes()
    for changed in mutations(original, count, seed=len(name)):
        path.write_bytes(changed)
        refusal = outcome(lambda: read_base(folder))
        assert refusal is None or str(folder) in refusal
    path.write_bytes(original)
    assert outcome(lambda: read_base(folder)) is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"vocab_size": 10**9}, "vocab_size is 1,000,000,000: more than the folder's weights can hold"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_hidden_layers": 3}, "weights are missing"),
        ({"hidden_size": 64, "head_dim": 16}, "but its config.json asks for"),
        ({"num_attention_heads": 0}, "model"),
        ({"num_attention_heads": "4"}, "num_attention_heads"),
    ],
    ids=str,
)
def test_config_that_does_not_fit_the_weights_is_refused(base, tmp_path, changes, named):
    """transformers would allocate what it says, or train on weights that it has drawn at random."""
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    write_json(folder / "config.json", json.loads((folder / "config.json").read_text()) | changes)
    assert named in outcome(lambda: read_base(folder))


SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("phi3", {"pad_token_id": 0}),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}),
        ("mixtral", {"num_local_experts": 4}),
        ("gpt_oss", {"num_local_experts": 4, "head_dim": 8}),
    ],
)
def test_sound_models_pass(tmp_path, kind, more):
    """Fused, turned and renamed weights, stored otherwise than the model holds them: nothing is wrong with these."""
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SMALL | more)))
    model.save_pretrained(tmp_path / kind)
    check_model_folder(str(tmp_path / kind))
    load_causal_lm(tmp_path / kind, torch.float32)


def test_base_that_does_not_fit_its_config_ends_all_ranks(base, tmp_path):
    """Under ZeRO-3 and FSDP2 ranks load together: one that went on alone would wait for the others."""
    faults = {
        "deeper": ({"num_hidden_layers": 3}, "weights are missing"),
        "wider": ({"intermediate_size": 80}, "asks for"),
    }
    for name, (changes, _) in faults.items():
        shutil.copytree(base, tmp_path / name)
        path = tmp_path / name / "config.json"
        write_json(path, json.loads(path.read_text()) | changes)
    models = [str(tmp_path / name) for name in faults]
    ranks = launch("workers.faults:bases_that_do_not_fit", 2, tmp_path / "ranks", models=models)
    for rank in ranks:
        assert len(rank) == 4
        for place, said in rank.items():
            assert faults[Path(place).name][1] in said, (place, said)


def test_index_names_files_of_its_folder_only(base, tmp_path):
    """It could name any file of the machine."""
    folder = tmp_path / "model"
    shutil.copytree(base, folder)
    path = folder / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("model-00001-of", "../model/model-00001-of"))
    assert "not a safetensors file of this folder" in outcome(lambda: read_base(folder))


# -- GGUF --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [100, pytest.param(300, marks=slow)])
def test_mutated_gguf_is_refused_or_read(tmp_path, count):
    """Its reader believes every count, in Python loops; only what passes our own look at the header gets there."""
    write_gguf(tmp_path / "tiny.gguf")
    original = (tmp_path / "tiny.gguf").read_bytes()
    header = original[:2000]
    passed = 0
    for index, changed in enumerate(mutations(header, count, seed=1)):
        path = tmp_path / f"{index}.gguf"
        path.write_bytes(changed + original[2000:])
        if outcome(lambda: check_gguf_header(path)) is None and passed < 6:  # noqa: B023
            passed += 1
            outcome(lambda: dequantize_gguf(path, tmp_path / "cache"))  # noqa: B023
        path.unlink()
    assert passed == 6


@pytest.mark.parametrize("at", [8, 16], ids=["tensors", "values"])
def test_gguf_of_more_than_the_file_can_hold_is_refused_at_once(tmp_path, at):
    """2^60 values would be read one by one."""
    write_gguf(tmp_path / "tiny.gguf")
    content = bytearray((tmp_path / "tiny.gguf").read_bytes())
    content[at : at + 8] = np.uint64(2**60).tobytes()
    (tmp_path / "tiny.gguf").write_bytes(content)
    assert "can't fit in the rest of the file" in outcome(lambda: check_gguf_header(tmp_path / "tiny.gguf"))


# -- data rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [10, pytest.param(40, marks=slow)])
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_mutated_rows_are_refused_or_read(tmp_path, suffix, count):
    """Rows come from anywhere; the tokenizer is Rust and answers a lone surrogate with a TypeError."""
    path, tokenizer = tmp_path / f"rows.{suffix}", make_tokenizer()
    text = json.dumps(ROWS[:3]) if suffix == "json" else "\n".join(map(json.dumps, ROWS[:3]))
    others = (*BOMBS, *(b'[{"text": %s}]' % value for value in (b'"\\ud800"', b'"\\u0000"', b"[]", b"NaN", b"1e999")))

    def read() -> None:
        rows = read_rows(path)
        build_dataset(rows, tokenizer, max_seq_length=16)

    for changed in mutations(text.encode(), count, seed=2, others=others):
        path.write_bytes(changed)
        refusal = outcome(read)
        assert refusal is None or "rows." in refusal
        outcome(lambda: make_items(read_rows(path)))
