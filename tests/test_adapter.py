"""An adapter folder holds all of the training and goes onto its own base only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architectures import logits_of, make_batches, make_model
from damage import reseal
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import smt_dist
from smt_dist import BlockSelection, SMTConfig
from smt_dist.checkpoint.adapter import ActiveBlocks, attach_adapter
from smt_dist.errors import SMTError

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"
SELECTION = BlockSelection(
    block_size=(8, 8), blocks={Q: [(0, 1), (3, 0)], V: [(1, 2)]}, shapes={Q: (32, 32), V: (16, 32)}
)
CONFIG = SMTConfig(block_size=8, groups=[{"name": "attention", "blocks": 3, "lr_multiplier": 2.0}])
FILES = ["README.md", "smt_blocks.safetensors", "smt_config.json", "smt_manifest.json", "smt_selection.json"]

NO_MANIFEST = ("smt_manifest.json", "missing")  # an adapter of an older version


def tuned_model(config: SMTConfig | None = CONFIG, selection: BlockSelection = SELECTION, seed: int = 1, **options):
    model = make_model("llama", **options)
    smt_dist.apply_selection(model, selection, config)
    generator = torch.Generator().manual_seed(seed)
    for layer in smt_dist.sparse_layers(model).values():
        layer.delta.data.normal_(std=0.3, generator=generator)
    return model


@pytest.fixture
def adapter(tmp_path) -> Path:
    """An adapter folder for ``make_model("llama")``."""
    smt_dist.save_adapter(tuned_model(), tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    reseal(path.parent)


def edit_tensors(path: Path, change) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)
    reseal(path.parent)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_folder_holds_what_the_documentation_says(adapter):
    """Other programs read these files; and nothing of the base belongs in them."""
    assert sorted(contents(adapter)) == FILES
    config = json.loads((adapter / "smt_config.json").read_text())
    assert config["block_size"] == 8
    assert config["groups"] == [{"name": "attention", "target_modules": "attention", "blocks": 3, "lr_multiplier": 2.0}]
    selection = json.loads((adapter / "smt_selection.json").read_text())
    assert selection["format_version"] == 1
    assert selection["block_size"] == [8, 8]
    assert selection["blocks"] == {Q: [[0, 1], [3, 0]], V: [[1, 2]]}
    tensors = load_file(adapter / "smt_blocks.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {Q: (16, 8), V: (8, 8)}
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert (adapter / "smt_blocks.safetensors").stat().st_size < 3 * 64 * 4 + 1000
    card = (adapter / "README.md").read_text()
    assert card.startswith("---\n")
    assert "3 blocks of 8 x 8 in 2 modules" in card
    assert "moved base" not in card


def test_the_same_blocks_make_the_same_files(tmp_path):
    """No date, path or host in them: equal runs can be compared byte for byte."""
    for name in "ab":
        smt_dist.save_adapter(tuned_model(), tmp_path / name)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_saved_are_the_fp32_masters_bit_for_bit(tmp_path, dtype):
    """A rounded copy would lose the small steps when training goes on."""
    model = tuned_model(dtype=dtype)
    smt_dist.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "smt_blocks.safetensors")
    for name, layer in smt_dist.sparse_layers(model).items():
        assert torch.equal(tensors[name], layer.delta.detach())
        assert not torch.equal(tensors[name], tensors[name].bfloat16().float())


def test_masters_that_an_engine_hands_over_are_saved_instead_of_rounded_copies(tmp_path):
    """DeepSpeed keeps masters apart: the parameters of the model are roundings."""
    model = tuned_model()
    masters = {name: layer.delta.detach() + 1 for name, layer in smt_dist.sparse_layers(model).items()}
    smt_dist.save_adapter(model, tmp_path, masters.items())
    tensors = load_file(tmp_path / "smt_blocks.safetensors")
    assert all(torch.equal(tensors[name], master) for name, master in masters.items())


def test_a_loaded_adapter_gives_the_same_logits(adapter):
    """The least an adapter has to do; the base around it stays frozen."""
    model = make_model("llama")
    loaded = smt_dist.load_adapter(model, adapter)
    assert torch.equal(logits_of(model), logits_of(tuned_model()))
    assert loaded.config == CONFIG == model.smt.config
    assert loaded.selection == SELECTION == model.smt.selection
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {f"{Q}.delta", f"{V}.delta"}


def test_a_fresh_process_loads_the_adapter_with_the_same_logits(adapter, tmp_path):
    """Nothing of the saving process may be needed: the files are all there is."""
    make_model("llama").save_pretrained(tmp_path / "base")
    torch.save(make_batches(1)[0]["input_ids"], tmp_path / "ids.pt")
    program = (
        "import sys, torch, smt_dist; from transformers import AutoModelForCausalLM\n"
        "base, adapter, ids, out = sys.argv[1:]\n"
        "model = AutoModelForCausalLM.from_pretrained(base).eval()\n"
        "smt_dist.load_adapter(model, adapter)\n"
        "torch.save(model(torch.load(ids)).logits.detach(), out)\n"
    )
    paths = [str(path) for path in (tmp_path / "base", adapter, tmp_path / "ids.pt", tmp_path / "logits.pt")]
    subprocess.run([sys.executable, "-c", program, *paths], check=True, cwd=tmp_path)
    expected = tuned_model()(torch.load(tmp_path / "ids.pt")).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-6, atol=1e-6)


def test_another_adapter_replaces_the_first(adapter, tmp_path):
    """Swapping tasks on one loaded base: blocks of the first that stay would mix the two."""
    other = tuned_model(None, BlockSelection(block_size=(16, 4), blocks={V: [(0, 0)]}), seed=2)
    smt_dist.save_adapter(other, tmp_path / "other")
    model = make_model("llama")
    smt_dist.load_adapter(model, adapter)
    smt_dist.load_adapter(model, tmp_path / "other")
    assert list(smt_dist.sparse_layers(model)) == [V]
    assert torch.equal(logits_of(model), logits_of(other))
    smt_dist.load_adapter(model, adapter)
    assert torch.equal(logits_of(model), logits_of(tuned_model()))


def test_a_saved_adapter_can_be_saved_again_as_it_was(adapter, tmp_path):
    """Load and save is a copy: no value changes on the way."""
    model = make_model("llama")
    smt_dist.load_adapter(model, adapter)
    smt_dist.save_adapter(model, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(adapter)


def test_an_empty_fingerprint_becomes_that_of_the_base_under_all_blocks(adapter, tmp_path):
    """Frozen ones too: else what goes on from a re-selection is refused by its own base."""
    read = smt_dist.read_adapter(adapter)
    trained = BlockSelection(block_size=(8, 8), blocks={Q: [(3, 0)]})
    model = make_model("llama")
    attach_adapter(model, read._replace(base_fingerprint="", active=ActiveBlocks(step=2, selection=trained)))
    assert model.smt.base_fingerprint == read.base_fingerprint
    smt_dist.save_adapter(model, tmp_path / "again")
    smt_dist.load_adapter(make_model("llama"), tmp_path / "again")


def test_a_selection_by_hand_is_saved_with_a_config_that_says_so(tmp_path):
    """An adapter without a config couldn't be continued."""
    smt_dist.save_adapter(tuned_model(config=None), tmp_path)
    adapter = smt_dist.read_adapter(tmp_path)
    assert adapter.config.block_size == (8, 8)
    assert adapter.config.groups[0].target_modules == [Q, V]
    assert adapter.config.groups[0].blocks == 3
    assert torch.equal(logits_of(tuned_model()), logits_of(_loaded(tmp_path)))


def _loaded(folder: Path, **options):
    model = make_model("llama", **options)
    smt_dist.load_adapter(model, folder)
    return model


# -- another base ------------------------------------------------------------------------------------------------


def test_another_base_of_the_same_shape_is_refused(adapter):
    """The blocks are differences to other weights: on this base they would be noise."""
    model = make_model("llama", seed=1)
    before = logits_of(model)
    with pytest.raises(SMTError, match=f"{adapter}: trained on another base model.*fingerprint"):
        smt_dist.load_adapter(model, adapter)
    assert torch.equal(logits_of(model), before)
    assert not smt_dist.sparse_layers(model)


def test_the_check_can_be_switched_off_on_purpose(adapter):
    """Trying an adapter on a related base (a newer release, say) is a choice that a user can make."""
    model = make_model("llama", seed=1)
    smt_dist.load_adapter(model, adapter, verify_base=False)
    assert list(smt_dist.sparse_layers(model)) == [Q, V]


def test_another_architecture_is_refused_by_a_module_that_it_lacks(adapter):
    """The message shows at a glance that it is the wrong model."""
    with pytest.raises(SMTError, match=rf"{adapter}.*GPTNeoXForCausalLM.*{Q}"):
        smt_dist.load_adapter(make_model("gpt_neox"), adapter)


@pytest.mark.parametrize("size", [64, 16])
def test_a_base_of_other_sizes_is_refused_by_module_and_folder(adapter, size):
    """The same names with other shapes: a larger model of the same family."""
    with pytest.raises(SMTError, match=r"adapter.*q_proj.*32"):
        smt_dist.load_adapter(make_model("llama", hidden_size=size, head_dim=size // 4), adapter)


def test_the_same_base_in_bf16_is_accepted(adapter):
    """Training in fp32 and serving in bf16 is ordinary; the rounding isn't another base."""
    model = make_model("llama").bfloat16()
    smt_dist.load_adapter(model, adapter)
    exact = logits_of(tuned_model())
    assert (logits_of(model).float() - exact).norm() < 0.03 * exact.norm()


def test_an_adapter_of_a_full_ft_warm_up_says_that_it_needs_the_moved_base(tmp_path):
    """Its blocks belong to weights that the warm-up moved; the card and the refusal must both say so."""
    config = SMTConfig(block_size=8, groups=[{"blocks": 3}], warmup={"mode": "full_ft"})
    smt_dist.save_adapter(tuned_model(config=config), tmp_path)
    assert "needs the moved base" in (tmp_path / "README.md").read_text()
    with pytest.raises(SMTError, match="as its full fine-tuning warm-up moved it"):
        smt_dist.load_adapter(make_model("llama", seed=1), tmp_path)


# -- damaged files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "how"),
    [(name, how) for name in FILES[1:] for how in ("missing", "empty", "cut", "garbage") if (name, how) != NO_MANIFEST],
)
def test_a_damaged_file_is_refused_by_its_name(adapter, name, how):
    """A copy that broke off is common; half an adapter may not pass for one."""
    path = adapter / name
    content = path.read_bytes()
    path.unlink()
    if how != "missing":
        path.write_bytes({"empty": b"", "cut": content[: len(content) * 3 // 4], "garbage": b"\xff" * 64}[how])
    model = make_model("llama")
    with pytest.raises(SMTError) as caught:
        smt_dist.load_adapter(model, adapter)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value).splitlines()) == 1
    assert not smt_dist.sparse_layers(model)


def test_an_adapter_of_an_older_version_is_read_with_a_warning(adapter, caplog):
    """It has no manifest, so damage to its values can't be seen: whoever relies on it has to know."""
    (adapter / "smt_manifest.json").unlink()
    assert smt_dist.read_adapter(adapter).selection == SELECTION
    assert "has no smt_manifest.json" in caplog.text


def test_a_model_card_may_be_edited(adapter):
    """Everybody does before publishing an adapter; nothing reads it."""
    (adapter / "README.md").write_text("# Mine")
    assert smt_dist.read_adapter(adapter).selection == SELECTION


def test_a_missing_folder_is_refused_by_its_name(tmp_path):
    """And not by the first file that isn't in it."""
    with pytest.raises(SMTError, match=f"{tmp_path / 'nothing'}: no such adapter folder"):
        smt_dist.load_adapter(make_model("llama"), tmp_path / "nothing")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: t.pop(V), V),
        (lambda t: t.update({"model.layers.1.self_attn.k_proj": torch.zeros(8, 8)}), "k_proj"),
        (lambda t: t.update({Q: torch.zeros(8, 8)}), rf"{Q} is \(8, 8\).*expected \(16, 8\)"),
        (lambda t: t.update({Q: torch.zeros(2, 8, 8)}), rf"{Q} is \(2, 8, 8\)"),
        (lambda t: t.update({Q: t[Q].bfloat16()}), rf"{Q} is .*BF16, expected .*F32"),
        (lambda t: t.clear(), Q),
        (lambda t: t[Q].fill_(float("nan")), f"{Q}.*not finite"),
    ],
    ids=["missing", "extra", "shape", "dimensions", "dtype", "none", "nan"],
)
def test_wrong_tensors_are_refused_by_file_and_module(adapter, change, problem):
    """Loading what fits and skipping the rest would give a third model, neither base nor tuned."""
    edit_tensors(adapter / FILES[1], change)
    model = make_model("llama")
    with pytest.raises(SMTError, match=problem) as caught:
        smt_dist.load_adapter(model, adapter)
    assert str(caught.value).startswith(str(adapter / FILES[1]))
    assert not smt_dist.sparse_layers(model)


def test_a_selection_that_is_not_the_tensors_is_refused(adapter):
    """Files of two runs in one folder: the blocks would land in other places."""
    edit_json(adapter / "smt_selection.json", blocks={Q: [[0, 1]], V: [[1, 2]]})
    with pytest.raises(SMTError, match=rf"{FILES[1]}: {Q} is \(16, 8\)"):
        smt_dist.read_adapter(adapter)


def test_blocks_moved_in_the_selection_file_are_noticed(adapter):
    """As many blocks in another place fit in shape; only the base's content tells."""
    edit_json(adapter / "smt_selection.json", blocks={Q: [[0, 2], [3, 0]], V: [[1, 2]]})
    with pytest.raises(SMTError, match="fingerprint"):
        smt_dist.load_adapter(make_model("llama"), adapter)


def test_an_incomplete_tensor_is_never_written_and_the_old_files_stay(adapter):
    """A partitioned parameter read by mistake (ZeRO-3) has the wrong shape: the last good adapter must survive."""
    before = contents(adapter)
    model = tuned_model(seed=3)
    deltas = {name: layer.delta.detach() for name, layer in smt_dist.sparse_layers(model).items()}
    deltas[V] = deltas[V][:4]
    with pytest.raises(RuntimeError, match=rf"{V}.*\(4, 8\), expected .* \(8, 8\)"):
        smt_dist.save_adapter(model, adapter, deltas.items())
    assert contents(adapter) == before


def test_a_failure_while_writing_leaves_no_half_file(adapter):
    """A full disk or a kill in the middle: the old file or the new one, and no rubbish beside it."""
    before = contents(adapter)

    def half_of_them(model):
        yield next((name, layer.delta) for name, layer in smt_dist.sparse_layers(model).items())
        raise OSError("disk full")

    model = tuned_model(seed=3)
    with pytest.raises(OSError, match="disk full"):
        smt_dist.save_adapter(model, adapter, half_of_them(model))
    assert contents(adapter)[FILES[1]] == before[FILES[1]]
    assert sorted(contents(adapter)) == FILES


def test_a_model_without_blocks_has_nothing_to_save(tmp_path):
    """An empty adapter would load anywhere and do nothing."""
    with pytest.raises(SMTError, match="no blocks to save"):
        smt_dist.save_adapter(make_model("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
