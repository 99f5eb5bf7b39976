"""Check the pictures of README and docs: up to date, readable, and made by one command."""

from __future__ import annotations

import importlib.util
import subprocess
from itertools import combinations
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
import torch
from browser import open_browser
from PIL import Image

from smt_dist import BlockScores, SMTConfig, select_blocks

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
IMAGES = sorted((DOCS / "images").iterdir())
# Of every text: where it stands in the drawing's own units.
BOXES = """
return [...document.querySelectorAll('text')].map(text => {
  const box = text.getBBox();
  return [text.textContent, box.x, box.y, box.x + box.width, box.y + box.height];
});
"""


def load(name: str) -> ModuleType:
    """Import a script that lies in docs/."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def drawing() -> ModuleType:
    return load("draw_smt")


def test_the_drawing_is_what_its_script_draws(drawing):
    """Compare the committed file; python docs/draw_smt.py draws it anew."""
    assert drawing.IMAGE.read_text(encoding="utf-8") == drawing.draw() == drawing.draw()


def test_the_drawing_is_an_svg_that_needs_nothing_else(drawing):
    root = ElementTree.fromstring(drawing.draw())
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root.get("viewBox") == f"0 0 {drawing.WIDTH} {drawing.HEIGHT}"
    assert not [name for element in root.iter() for name in element.attrib if name.endswith(("href", "src", "style"))]


def test_texts_of_the_drawing_lie_inside_it_and_apart(drawing, tmp_path):
    """Measure every text in the browser."""
    with open_browser(tmp_path) as browser:
        browser.get(drawing.IMAGE.as_uri())
        boxes = browser.execute_script(BOXES)
    assert len(boxes) > 20
    for text, left, top, right, bottom in boxes:
        assert 30 <= left < right <= drawing.WIDTH - 30, text
        assert 20 <= top < bottom <= drawing.HEIGHT - 15, text
    for (one, *a), (other, *b) in combinations(boxes, 2):
        assert a[2] + 3 < b[0] or b[2] + 3 < a[0] or a[3] <= b[1] + 2 or b[3] <= a[1] + 2, (one, other)


def test_the_drawing_selects_as_the_package_does(drawing):
    """Compare its blocks with the default strategy's, its figures with configs/README.md."""
    scores = {f"layers.{layer}.{kind}": table for (layer, kind), table in drawing.make_scores().items()}
    found = BlockScores(
        block_size=(1, 1),
        tables={name: torch.tensor(table, dtype=torch.float64) for name, table in scores.items()},
        shapes=dict.fromkeys(scores, (drawing.SIDE, drawing.SIDE)),
        groups={"all": list(scores)},
        parameters_2d=10**6,
        score="abs_mean",
        steps=1,
    )
    groups = [{"name": "all", "target_modules": "x", "blocks": drawing.BUDGET}]
    selection = select_blocks(found, SMTConfig.model_validate({"block_size": 1, "groups": groups}))
    drawn = {
        (f"layers.{block.layer}.{block.kind}", block.row, block.col) for block in drawing.select(drawing.make_scores())
    }
    assert drawn == {(name, *block) for name, blocks in selection.blocks.items() for block in blocks}
    (line,) = [line for line in (ROOT / "configs/README.md").read_text().splitlines() if "| Llama-2-7B |" in line]
    assert f"| {drawing.LLAMA_2_7B_TRAINED:,} |" in line


def test_every_image_is_made_by_the_one_command_and_small(drawing):
    screenshots = load("take_screenshots")
    made = [drawing.IMAGE.name, *(f"{name}.png" for name in screenshots.PICTURES)]
    assert [path.name for path in IMAGES] == sorted(made)
    said = subprocess.run([DOCS / "make_pictures.sh", "--help"], capture_output=True, text=True, check=True).stdout
    assert all(name in said for name in made)
    for path in IMAGES:
        assert path.stat().st_size <= screenshots.MOST_BYTES, path.name


@pytest.mark.parametrize("path", [path for path in IMAGES if path.suffix == ".png"], ids=lambda path: path.name)
def test_screenshots_are_sharp_and_not_blank(path):
    with Image.open(path) as image:
        assert image.width >= 1600
        assert image.height < 1.5 * image.width
        assert len(image.convert("RGB").getcolors(image.width * image.height)) > 100


def test_an_unknown_argument_is_refused():
    ended = subprocess.run([DOCS / "make_pictures.sh", "--all"], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "--help" in ended.stderr
