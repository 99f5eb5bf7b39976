"""The page shows every chosen block in a real browser, without a network and without script errors."""

from __future__ import annotations

import builtins
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import open_browser
from PIL import Image
from selenium.webdriver.support.ui import WebDriverWait
from tiers import slow

from smt_dist import BlockScores, BlockSelection, SMTConfig, select_blocks
from smt_dist.report import summary as report_summary
from smt_dist.report import write_selection_report
from smt_dist.report.page import write_page
from smt_dist.report.summary import MAX_CELLS, short_kinds, summarise
from smt_dist.selection.block_scores import SCORES_FILE, belongs_to, load_scores, save_scores

SIDE = 8
# Names that would be markup if they weren't escaped.
EVIL = "x</script><script>window.evil = 1</script><img src=x onerror='window.evil = 1'>"
HISTORY = [{"step": step, "loss": 2 - step / 10, "learning_rate": 1e-4} for step in range(1, 9)] + [
    {"step": 4, "eval_loss": 1.7},
    {"step": 8, "eval_loss": float("nan")},
]


def make_scores(layers: int = 3, side: int = 4, group: str = "attention") -> BlockScores:
    """q and k of each layer, k with half the rows, and a module outside the layers."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        f"model.layers.{layer}.self_attn.{kind}": (rows, side)
        for layer in range(layers)
        for kind, rows in (("q_proj", side), ("k_proj", side // 2))
    } | {"lm_head": (2 * side, side)}
    tables = {name: torch.rand(*shape, generator=generator, dtype=torch.float64) ** 6 for name, shape in shapes.items()}
    tables["lm_head"][0, 0] = 0.0
    tables["lm_head"][0, 1] = -torch.inf  # may not be chosen
    return BlockScores(
        block_size=(SIDE, SIDE),
        tables=tables,
        shapes={name: (rows * SIDE, cols * SIDE) for name, (rows, cols) in shapes.items()},
        groups={group: list(shapes)[:-1], "head": ["lm_head"]},
        parameters_2d=10**6,
        score="abs_mean",
        steps=5,
    )


def choose(scores: BlockScores, blocks: int = 11) -> BlockSelection:
    groups = [{"name": name, "target_modules": "x", "blocks": blocks} for name in scores.groups]
    return select_blocks(scores, SMTConfig.model_validate({"block_size": SIDE, "groups": groups}))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


def look(browser, page: Path) -> dict[str, object]:
    """What a browser makes of a page: script errors, requests to anywhere, marked blocks in the DOM, its text."""
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(page.as_uri())
    WebDriverWait(browser, 60).until(
        lambda b: b.execute_script(
            "return document.querySelectorAll('.plotly-graph-div').length > 0 && "
            "[...document.querySelectorAll('.plotly-graph-div')].every(d => d.querySelector('.main-svg'))"
        )
    )
    requests = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [r["params"]["request"]["url"] for r in requests if r["method"] == "Network.requestWillBeSent"]
    return {
        "errors": [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"],
        "requests": [url for url in urls if not url.startswith(("file:", "data:", "blob:"))],
        "marked": browser.execute_script("return document.querySelectorAll('.map .scatterlayer path.point').length"),
        "maps": browser.execute_script("return document.querySelectorAll('.map .heatmaplayer image').length"),
        "charts": browser.execute_script("return [...document.querySelectorAll('.chart > div')].length"),
        "images": browser.execute_script("return [...document.images].filter(i => i.naturalWidth > 0).map(i => i.id)"),
        "text": browser.execute_script("return document.body.innerText"),
        "evil": browser.execute_script("return window.evil || 0"),
    }


def test_every_chosen_block_is_marked_in_the_browser(browser, tmp_path):
    """What a person sees is the selection, with its scores, shares and curve; nothing is fetched, nothing fails."""
    scores = make_scores()
    selection = choose(scores)
    assert write_selection_report(tmp_path / "selection.html", selection, scores, HISTORY, {"model": "tiny"})
    seen = look(browser, tmp_path / "selection.html")
    assert (seen["errors"], seen["requests"]) == ([], [])
    assert seen["marked"] == len(selection) == 22
    assert seen["maps"] == 3
    assert seen["charts"] == 5  # by weight, kind, depth; scores; curve
    assert seen["images"] == ["by-kind", "by-depth", "scores", "curve"]
    for shown in ("22 of 8 x 8", "abs_mean, 5 warm-up steps", "tiny", "Learning curve"):
        assert shown in seen["text"]


def test_equal_selections_are_equal_pages(tmp_path):
    """A page under version control would change with every run: matplotlib numbers its shapes at random."""
    scores = make_scores()
    for name in ("a.html", "b.html"):
        write_page(tmp_path / name, summarise(choose(scores), scores, HISTORY, {}))
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_names_are_text_whatever_they_look_like(browser, tmp_path):
    """A page that runs what a config's group or a module is called could do anything to who opens it."""
    scores = make_scores(group=EVIL)
    renamed = {name.replace("q_proj", EVIL.replace(".", "")): name for name in scores.tables}
    scores = BlockScores(
        block_size=scores.block_size,
        tables={new: scores.tables[old] for new, old in renamed.items()},
        shapes={new: scores.shapes[old] for new, old in renamed.items()},
        groups={group: [n for n, old in renamed.items() if old in names] for group, names in scores.groups.items()},
        parameters_2d=scores.parameters_2d,
        score=EVIL,
        steps=1,
    )
    write_page(tmp_path / "selection.html", summarise(choose(scores), scores, [], {EVIL: EVIL}))
    seen = look(browser, tmp_path / "selection.html")
    assert (seen["errors"], seen["requests"], seen["evil"]) == ([], [], 0)
    assert seen["marked"] == 22
    assert EVIL in seen["text"]


def test_a_selection_without_scores_still_shows_its_blocks(browser, tmp_path):
    """``train.py --selection FILE`` may get no more than the file."""
    write_page(tmp_path / "selection.html", summarise(choose(make_scores()), None, [], {}))
    seen = look(browser, tmp_path / "selection.html")
    assert (seen["errors"], seen["marked"], seen["charts"]) == ([], 22, 3)
    assert "The scores are not known" in seen["text"]


def test_a_page_of_too_many_blocks_takes_them_together_and_says_so(browser, tmp_path, monkeypatch):
    """A 70B has a million blocks: drawn one by one, no browser would open the page."""
    monkeypatch.setattr(report_summary, "MAX_CELLS", 40)
    scores = make_scores()
    selection = choose(scores)
    write_page(tmp_path / "selection.html", summarise(selection, scores, [], {}))
    seen = look(browser, tmp_path / "selection.html")
    cells = {(module, row // 2, col // 2) for module, blocks in selection.blocks.items() for row, col in blocks}
    assert (seen["errors"], seen["marked"]) == ([], len(cells))
    assert len(cells) < 22
    assert "There are too many blocks to draw" in seen["text"]
    assert "a cell is 2 x 2 blocks" in seen["text"]


@slow
def test_a_page_of_a_70b_has_a_reasonable_size(tmp_path):
    """80 layers of q, k, v and MLP in blocks of 256: 962,560 blocks."""
    shapes = {"q_proj": (32, 32), "k_proj": (4, 32), "v_proj": (4, 32), "up_proj": (112, 32), "down_proj": (32, 112)}
    shapes |= {"gate_proj": (112, 32)}
    generator = torch.Generator().manual_seed(0)
    tables = {
        f"model.layers.{layer}.{kind}": torch.rand(*shape, generator=generator, dtype=torch.float64)
        for layer in range(80)
        for kind, shape in shapes.items()
    }
    size = {name: (table.shape[0] * 256, table.shape[1] * 256) for name, table in tables.items()}
    scores = BlockScores((256, 256), tables, size, {"all": list(tables)}, 70 * 10**9, "abs_mean", 100)
    found = {name: (table > 0.99).nonzero().tolist() for name, table in tables.items()}
    selection = BlockSelection(block_size=(256, 256), blocks={name: blocks for name, blocks in found.items() if blocks})
    summary = summarise(selection, scores, [], {})
    cells = sum(tile.chosen.size for tiles in summary.sheets.values() for tile in tiles)
    assert MAX_CELLS / 4 < cells <= MAX_CELLS
    assert sum(int(tile.chosen.sum()) for tiles in summary.sheets.values() for tile in tiles) == len(selection)
    write_page(tmp_path / "selection.html", summary)
    plotly_itself = 5_000_000
    assert (tmp_path / "selection.html").stat().st_size < plotly_itself + 6_000_000


def test_taking_blocks_together_keeps_the_best_score_and_the_number_of_chosen():
    """Odd sides too: the last cells are smaller."""
    table = torch.arange(15, dtype=torch.float64).reshape(3, 5)
    table[2, 4] = -torch.inf
    scores = BlockScores((SIDE, SIDE), {"m": table}, {"m": (24, 40)}, {"g": ["m"]}, 10**6, "l1", 1)
    selection = BlockSelection(block_size=(SIDE, SIDE), blocks={"m": [(0, 0), (1, 1), (2, 3)]})
    tile = report_summary._pool(summarise(selection, scores, [], {}).sheets["m"][0].scores, 2, np.fmax)
    np.testing.assert_array_equal(tile, [[6, 8, 9], [11, 13, np.nan]])
    counts = report_summary._pool(summarise(selection, scores, [], {}).sheets["m"][0].chosen, 2, np.add)
    np.testing.assert_array_equal(counts, [[2, 0, 0], [0, 1, 0]])


def test_the_numbers_are_those_of_the_selection():
    """Shares, distribution and cut-offs, each from the selection itself."""
    scores = make_scores()
    selection = choose(scores)
    summary = summarise(selection, scores, HISTORY, {})
    for kind, ending in (("q_proj", "q_proj"), ("k_proj", "k_proj"), ("lm_head", "lm_head")):
        modules = [module for module in scores.tables if module.endswith(ending)]
        assert summary.chosen_by_kind[kind] == sum(len(selection.blocks.get(module, ())) for module in modules)
        assert summary.blocks[kind] == sum(scores.tables[module].numel() for module in modules)
    assert summary.layers == ["model.layers.0", "model.layers.1", "model.layers.2", "lm_head"]
    assert summary.all_counts.sum() == sum(table.numel() for table in scores.tables.values()) - 1
    assert summary.chosen_counts.sum() == 22
    for group, modules in scores.groups.items():
        chosen = [scores.tables[m][block].item() for m in modules for block in selection.blocks.get(m, ())]
        assert summary.cut_offs[group] == pytest.approx(np.log10(min(chosen)))
    assert summary.losses["training"] == [(step, 2 - step / 10) for step in range(1, 9)]
    assert summary.losses["evaluation"] == [(4, 1.7)], "what isn't finite can't be drawn"


def test_kinds_are_as_short_as_they_can_be_told_apart():
    """Experts are one kind, and two attentions of a layer are two."""
    modules = ["m.0.self_attn.q", "m.0.cross_attn.q", "m.1.mlp.experts.3.up", "m.1.mlp.experts.4.up", "head"]
    kinds = ["self_attn.q", "cross_attn.q", "up", "up", "head"]
    assert list(short_kinds(dict.fromkeys(modules)).values()) == kinds


def test_png_files_show_the_marks(tmp_path):
    """Looked at pixel by pixel: the maps' file has red marks, and both are large enough to print."""
    scores = make_scores()
    assert write_selection_report(tmp_path / "selection.html", choose(scores), scores, HISTORY)
    for name in ("selection.png", "selection_blocks.png"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 600
            pixels = np.asarray(image.convert("RGB")).astype(int)
        red = (pixels[..., 0] > 190) & (pixels[..., 1] < 70) & (pixels[..., 2] < 70)
        assert red.sum() > 100, name


@pytest.mark.parametrize("missing", ["plotly", "matplotlib"])
def test_without_a_plotting_library_one_line_is_logged_and_nothing_fails(tmp_path, monkeypatch, caplog, missing):
    """A training run may not end for a report."""
    for module in [name for name in __import__("sys").modules if name.startswith(("smt_dist.report.p", missing))]:
        monkeypatch.delitem(__import__("sys").modules, module)
    real = builtins.__import__

    def importing(name, *rest):
        if name.split(".")[0] == missing:
            raise ImportError(f"No module named '{missing}'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", importing)
    with caplog.at_level(logging.INFO, "smt_dist"):
        assert not write_selection_report(tmp_path / "selection.html", choose(make_scores()))
    said = [r.getMessage() for r in caplog.records if "smt_dist[plots]" in r.getMessage()]
    assert len(said) == 1
    assert missing in said[0]
    assert not list(tmp_path.iterdir())


def test_a_report_that_fails_is_named_and_no_more(tmp_path, monkeypatch, caplog):
    """Whatever a plotting library does."""

    def broken(*_):
        raise OverflowError("too wide")

    monkeypatch.setattr("smt_dist.report.paper.overview", broken)
    with caplog.at_level(logging.WARNING, "smt_dist"):
        assert not write_selection_report(tmp_path / "selection.html", choose(make_scores()))
    assert "OverflowError: too wide" in caplog.text


def test_scores_survive_a_file(tmp_path):
    """Values of minus infinity too; equal scores are equal files."""
    scores = make_scores()
    for name in ("a", "b"):
        save_scores(scores, tmp_path / name)
    again = load_scores(tmp_path / "a")
    assert list(again.tables) == list(scores.tables)
    assert all(torch.equal(again.tables[name], table) for name, table in scores.tables.items())
    assert vars(again) | {"tables": 0} == vars(scores) | {"tables": 0}
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# -- the programs ------------------------------------------------------------------------------------------------


def test_programs_write_the_report_beside_what_they_make(train, tmp_path):
    """The selection's report and scores first; a run with that selection finds the scores and adds its curve."""
    chosen = tmp_path / "made" / "chosen.json"
    made = train(program="select_blocks.py", selection_report=True, output=chosen, output_dir=tmp_path / "unused")
    assert made.code == 0, made.err
    names = {"chosen.json", "chosen.html", "chosen.png", "chosen_blocks.png", "chosen_scores.safetensors"}
    assert {path.name for path in (tmp_path / "made").iterdir()} == names
    assert "Learning curve" not in (tmp_path / "made" / "chosen.html").read_text()

    trained = train(selection_report=True, selection=chosen, max_steps=2)
    assert trained.code == 0, trained.err
    page = (tmp_path / "out" / "selection.html").read_text()
    assert "Learning curve" in page
    assert "abs_mean, 2 warm-up steps" in page
    without = train(selection_report=False, output_dir=tmp_path / "bare", max_steps=1)
    assert without.code == 0, without.err
    assert not list((tmp_path / "bare").glob("selection*"))


@pytest.mark.parametrize("is_wanted", [pytest.param(True, marks=slow), False])
def test_damaged_scores_cost_no_more_than_the_report(train, tmp_path, caplog, is_wanted):
    """They are there for the report alone: a run that has been saved well would never be resumed."""
    assert train(save_strategy="steps", save_steps=1, max_steps=1).code == 0
    (tmp_path / "out" / SCORES_FILE).write_bytes(b"damaged")
    again = train(selection_report=is_wanted, max_steps=2, resume_from_checkpoint="auto")
    assert again.code == 0, again.err
    assert ("report goes without scores" in caplog.text) == is_wanted


def test_scores_of_another_selection_are_not_shown():
    """An output folder that is used again holds the last run's scores."""
    scores = make_scores()
    assert belongs_to(scores, choose(scores))
    assert not belongs_to(scores, BlockSelection(block_size=(4, 4), blocks={"lm_head": [(0, 0)]}))
    assert not belongs_to(scores, BlockSelection(block_size=(SIDE, SIDE), blocks={"other": [(0, 0)]}))
    wrong = BlockSelection(block_size=(SIDE, SIDE), blocks={"lm_head": [(0, 0)]}, shapes={"lm_head": (8, 8)})
    assert not belongs_to(scores, wrong)
