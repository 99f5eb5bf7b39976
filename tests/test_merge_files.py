"""Merging on disk, one weight at a time: the same bits as in memory, an ordinary checkpoint, or nothing at all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from architectures import logits_of, make_model
from safetensors.torch import load_file, save_file
from tiny_tokenizer import make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import smt_dist
from smt_dist import BlockSelection, SMTConfig
from smt_dist.checkpoint.merge_files import merge_adapter_files
from smt_dist.errors import SMTError

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
SELECTION = BlockSelection(block_size=(8, 8), blocks={Q: [(0, 1), (3, 0)], V: [(1, 2)]})
HEAD = BlockSelection(block_size=(8, 8), blocks={"lm_head": [(0, 0), (7, 3)], Q: [(0, 0)]})
SMALL_SHARDS = 20_000  # bytes: several files for the tiny model


class Case:
    """A base on disk, an adapter for it, and the adapted model."""

    def __init__(
        self, folder: Path, selection: BlockSelection = SELECTION, shard: str | int = "5GB", std: float = 0.1, **options
    ) -> None:
        self.base, self.adapter, self.output = folder / "base", folder / "adapter", folder / "merged"
        self.model = make_model("llama", **options)
        self.model.save_pretrained(self.base, max_shard_size=shard)
        make_tokenizer().save_pretrained(self.base)
        config = SMTConfig(block_size=8, groups=[{"blocks": 3}], untie=selection is HEAD)
        smt_dist.apply_selection(self.model, selection, config)
        generator = torch.Generator().manual_seed(1)
        for layer in smt_dist.sparse_layers(self.model).values():
            layer.delta.data.normal_(std=std, generator=generator)
        smt_dist.save_adapter(self.model, self.adapter)

    def merge(self, **options):
        return merge_adapter_files(self.base, self.adapter, self.output, **options)

    def merged_in_memory(self) -> dict[str, torch.Tensor]:
        smt_dist.merge_blocks(self.model)
        return self.model.state_dict()


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shard", ["5GB", SMALL_SHARDS], ids=["one file", "shards"])
def test_the_files_hold_the_bits_of_the_merge_in_memory(tmp_path, dtype, shard):
    """Two ways to merge that differ would make two models of one adapter."""
    case = Case(tmp_path, dtype=dtype, shard=shard)
    report = case.merge()
    assert_same_bits(tensors_of(case.output), case.merged_in_memory())
    assert (report.weights, report.parameters) == (2, 3 * 64)
    assert (report.lost > 0) == (dtype != torch.float32) or report.lost < 1e-6


def test_the_output_is_an_ordinary_model_folder(tmp_path):
    """transformers alone loads model and tokenizer; nothing beside the usual files is there."""
    case = Case(tmp_path, shard=SMALL_SHARDS)
    case.merge(max_shard_bytes=SMALL_SHARDS)
    files = {path.name for path in case.output.iterdir()}
    index = json.loads((case.output / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 2
    assert {path.name for path in case.output.glob("*.safetensors")} == shards
    others = {path.name for path in case.base.iterdir() if not path.name.startswith("model")}
    assert files == others | shards | {"model.safetensors.index.json"}
    assert index["metadata"]["total_size"] == sum(
        t.numel() * t.element_size() for t in tensors_of(case.output).values()
    )
    again, info = AutoModelForCausalLM.from_pretrained(case.output, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    merged = case.merged_in_memory()
    assert_same_bits(again.state_dict(), merged)
    assert torch.equal(logits_of(again.eval()), logits_of(case.model))
    assert AutoTokenizer.from_pretrained(case.output)("abc") == make_tokenizer()("abc")


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_another_dtype_rounds_the_fp32_sum_once(tmp_path, base, dtype):
    """Rounding to the base's dtype first would lose a part of the training that the output could hold."""
    case = Case(tmp_path, dtype=base)
    expected = {}
    for name, tensor in tensors_of(case.base).items():
        exact, module = tensor.float(), name.removesuffix(".weight")
        for index, (row, col) in enumerate(SELECTION.blocks.get(module, [])):
            delta = smt_dist.sparse_layers(case.model)[module].delta.detach()[index * 8 : index * 8 + 8]
            exact[row * 8 : row * 8 + 8, col * 8 : col * 8 + 8] += delta
        expected[name] = exact.to(dtype)
    case.merge(dtype=dtype)
    assert_same_bits(tensors_of(case.output), expected)
    assert json.loads((case.output / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert AutoModelForCausalLM.from_pretrained(case.output).dtype == dtype


def test_a_tied_head_gets_a_weight_of_its_own(tmp_path):
    """The base's file has no head: without one of its own, the training would go to the embedding or be lost."""
    case = Case(tmp_path, HEAD, tie_word_embeddings=True)
    assert "lm_head.weight" not in tensors_of(case.base)
    case.merge()
    again = AutoModelForCausalLM.from_pretrained(case.output).eval()
    merged = case.merged_in_memory()
    assert torch.equal(again.lm_head.weight, merged["lm_head.weight"])
    assert torch.equal(again.model.embed_tokens.weight, merged["model.embed_tokens.weight"])
    assert not torch.equal(again.lm_head.weight, again.model.embed_tokens.weight)
    assert torch.equal(logits_of(again), logits_of(case.model))


def test_a_base_whose_files_name_tensors_without_the_prefix_is_merged_too(tmp_path):
    """Checkpoints saved from the bare model (older GPT-NeoX or Falcon ones) lack "model."."""
    case = Case(tmp_path)
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors_of(case.base).items()}
    save_file(tensors, case.base / "model.safetensors", {"format": "pt"})
    case.merge()
    expected = {name.removeprefix("model."): tensor for name, tensor in case.merged_in_memory().items()}
    assert_same_bits(tensors_of(case.output), expected)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda c: make_model("llama", seed=1).save_pretrained(c.base), "adapter: trained on another base model"),
        (lambda c: make_model("gpt_neox").save_pretrained(c.base), f"base: GPTNeoXForCausalLM has no module {Q}"),
        (lambda c: make_model("llama", hidden_size=64, head_dim=16).save_pretrained(c.base), "adapter|q_proj"),
        (lambda c: shutil.rmtree(c.base), "base"),
        (lambda c: shutil.rmtree(c.adapter), "adapter: no such adapter folder"),
        (lambda c: (c.base / "config.json").unlink(), "base"),
        (lambda c: (c.base / "config.json").write_text("{"), "base"),
        (lambda c: (c.base / "model.safetensors").unlink(), "base: has neither model.safetensors nor"),
        (lambda c: cut(c.base / "model.safetensors"), "model.safetensors: damaged or not"),
        (lambda c: (c.base / "model.safetensors.index.json").write_text("[]"), "index.json: expected a JSON object"),
        (lambda c: cut(c.adapter / "smt_blocks.safetensors"), "adapter/smt_blocks.safetensors"),
        (lambda c: c.output.write_text(""), "merged: exists already"),
        (lambda c: (c.output.mkdir(), (c.output / "precious").write_text("")), "merged: exists already"),
    ],
    ids=[
        "other base", "other architecture", "other sizes", "no base", "no adapter", "no config", "bad config",
        "no weights", "cut weights", "bad index", "cut adapter", "output is a file", "output is full",
    ],
)  # fmt: skip
def test_what_cannot_be_merged_is_refused_by_name_and_leaves_nothing(tmp_path, damage, named):
    """Half a merged model looks like a whole one; and an existing folder may hold someone's work."""
    case = Case(tmp_path)
    damage(case)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(SMTError, match=named) as caught:
        case.merge()
    assert len(str(caught.value).splitlines()) == 1
    assert set(tmp_path.rglob("*")) == before


def test_a_merge_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    """A full disk in the middle of 140 GB: no folder that looks complete."""
    case = Case(tmp_path)

    def full_disk(*_):
        raise OSError("disk full")

    monkeypatch.setattr("smt_dist.checkpoint.merge_files.save_file", full_disk)
    with pytest.raises(SMTError, match=r"can't be written \(disk full\)"):
        case.merge()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_empty_output_folder_is_taken(tmp_path):
    """`mktemp -d` and the like make the folder first."""
    case = Case(tmp_path)
    case.output.mkdir()
    case.merge()
    assert (case.output / "model.safetensors").exists()


@pytest.mark.parametrize("stored", ["lm_head.weight", "model.embed_tokens.weight", "both"])
def test_merging_a_tied_head_leaves_the_embedding_alone(tmp_path, stored):
    """A tie is stored under either name: missed, the embedding would silently get the head's blocks as well."""
    case = Case(tmp_path, HEAD, tie_word_embeddings=True)
    weights = load_file(case.base / "model.safetensors")
    (shared,) = (weights.pop(name) for name in ("lm_head.weight", "model.embed_tokens.weight") if name in weights)
    names = ["lm_head.weight", "model.embed_tokens.weight"] if stored == "both" else [stored]
    save_file(weights | {name: shared.clone() for name in names}, case.base / "model.safetensors", {"format": "pt"})

    case.merge()
    assert json.loads((case.output / "config.json").read_text())["tie_word_embeddings"] is False
    assert_same_bits(tensors_of(case.output), case.merged_in_memory())
    merged = AutoModelForCausalLM.from_pretrained(case.output, dtype=torch.float32).eval()
    torch.testing.assert_close(logits_of(merged), logits_of(case.model), rtol=1e-5, atol=1e-6)
