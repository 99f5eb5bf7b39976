"""A GGUF file becomes an ordinary model folder: complete or absent, without quantisation marks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quants
from transformers import AutoModelForCausalLM, AutoTokenizer

from smt_dist.errors import SMTError
from smt_dist.models import gguf as smt_gguf
from smt_dist.models.gguf import default_cache_dir, dequantize_gguf, find_gguf_file

HIDDEN, FEED_FORWARD, HEADS, LAYERS = 32, 64, 2, 1
TOKENS = ["<unk>", "<s>", "</s>", *"abcdefgh", "ab"]
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """A one-layer Llama with a byte-pair tokenizer and tied embeddings, its matrices quantised to Q8_0.

    Returns:
        The dequantised values of the tensors.
    """
    random = np.random.default_rng(0)
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(["a b"])
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    shapes = {"token_embd": (len(TOKENS), HIDDEN), "output_norm": (HIDDEN,), "blk.0.attn_norm": (HIDDEN,)}
    shapes |= {f"blk.0.attn_{name}": (HIDDEN, HIDDEN) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_norm": (HIDDEN,), "blk.0.ffn_down": (HIDDEN, FEED_FORWARD)}
    shapes |= {f"blk.0.ffn_{name}": (FEED_FORWARD, HIDDEN) for name in ("gate", "up")}
    values = {}
    for name, shape in shapes.items():
        tensor = random.standard_normal(shape, dtype=np.float32)
        if len(shape) == 2:
            packed = quants.quantize(tensor, GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{name}.weight", packed, raw_dtype=GGMLQuantizationType.Q8_0)
            tensor = quants.dequantize(packed, GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{name}.weight", tensor)
        values[name] = tensor
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    write_gguf(path)
    return path


def test_folder_is_an_ordinary_model(gguf_file, tmp_path):
    """Quantisation marks would make Trainer and ZeRO-3 refuse the model; an untied head would train apart."""
    folder = dequantize_gguf(gguf_file, tmp_path / "cache", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder)
    values = write_gguf(tmp_path / "again.gguf")
    layer = model.model.layers[0]
    np.testing.assert_array_equal(layer.self_attn.v_proj.weight.detach().numpy(), values["blk.0.attn_v"])
    np.testing.assert_array_equal(layer.mlp.down_proj.weight.detach().numpy(), values["blk.0.ffn_down"])
    assert model.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not hasattr(model.config, "quantization_config")
    assert not getattr(model, "is_quantized", False)
    model.save_pretrained(tmp_path / "saved")

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("abc", add_special_tokens=False)["input_ids"] == [TOKENS.index("ab"), TOKENS.index("c")]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert tokenizer.chat_template == CHAT_TEMPLATE


def test_second_call_reuses_the_folder(gguf_file, tmp_path, monkeypatch):
    """Every rank and every later run would otherwise dequantise again."""
    first = dequantize_gguf(gguf_file, tmp_path)
    monkeypatch.setattr(smt_gguf, "_convert", lambda *_: pytest.fail("converted twice"))
    assert dequantize_gguf(gguf_file, tmp_path) == first
    assert first.name.startswith("tiny.Q8_0-")
    assert first.name.endswith("-bfloat16")


def test_interrupted_conversion_leaves_nothing_that_looks_complete(gguf_file, tmp_path, monkeypatch):
    """A half-written folder, reused, fails later in a place that doesn't tell why."""

    def convert_half(_file, target, _dtype):
        (target / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(smt_gguf, "_convert", convert_half)
    with pytest.raises(KeyboardInterrupt):
        dequantize_gguf(gguf_file, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_loser_of_a_race_takes_the_winners_folder(gguf_file, tmp_path, monkeypatch):
    """Jobs that start together share the cache."""

    def convert_too_late(_file, target, _dtype):
        winner = target.parent / target.name[1:].rsplit("-", 1)[0]
        winner.mkdir()
        (winner / "config.json").write_text("winner")
        (target / "config.json").write_text("loser")

    monkeypatch.setattr(smt_gguf, "_convert", convert_too_late)
    folder = dequantize_gguf(gguf_file, tmp_path)
    assert (folder / "config.json").read_text() == "winner"
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        (0, "isn't a GGUF file"),
        (4, "damaged GGUF header: it is cut short"),
        (40, "damaged GGUF header"),
        (0.5, "damaged GGUF header"),
        (0.95, "can't be read as a GGUF model"),
    ],
)
def test_cut_file_is_named(gguf_file, tmp_path, keep, message):
    """An interrupted download is the usual cause."""
    content = gguf_file.read_bytes()
    damaged = tmp_path / "cut.gguf"
    damaged.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(SMTError, match=r"cut\.gguf: " + message) as caught:
        dequantize_gguf(damaged, tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_file_is_looked_up_beside_the_model(gguf_file, tmp_path, monkeypatch):
    """Both the file's path and its name inside the model's folder are in use."""
    assert find_gguf_file(None, gguf_file) == gguf_file
    assert find_gguf_file(str(gguf_file.parent), gguf_file.name) == gguf_file
    with pytest.raises(SMTError, match=r"no such file: none\.gguf or .*none\.gguf"):
        find_gguf_file(str(tmp_path), "none.gguf")
    with pytest.raises(SMTError, match="no such file"):
        dequantize_gguf(tmp_path / "none.gguf", tmp_path)
    monkeypatch.setenv("SMT_DIST_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
