"""The geometry of blocks, and the selection file that says which of them are trained."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smt_dist.errors import SMTError
from smt_dist.sparse.blocks import BlockGrid, BlockSelection, read_blocks, resolve_block_size, write_blocks

Q = "model.layers.0.self_attn.q_proj"
K = "model.layers.0.self_attn.k_proj"


def selection_json(**changes) -> str:
    content = {"format_version": 1, "block_size": [4, 8], "blocks": {Q: [[0, 1], [1, 0]]}, "shapes": {Q: [8, 16]}}
    return json.dumps({**content, **changes})


@st.composite
def grids(draw) -> BlockGrid:
    """Any small grid, square or not."""
    block_rows, block_cols, down, across = (draw(st.integers(1, 6)) for _ in range(4))
    return BlockGrid(down * block_rows, across * block_cols, block_rows, block_cols)


@st.composite
def grids_with_blocks(draw) -> tuple[BlockGrid, list[tuple[int, int]]]:
    """A grid and some of its blocks, in any order."""
    grid = draw(grids())
    down, across = grid.shape
    block = st.tuples(st.integers(0, down - 1), st.integers(0, across - 1))
    return grid, draw(st.lists(block, min_size=1, unique=True))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(grids())
def test_the_blocks_of_a_grid_cover_each_element_once(grid):
    """Otherwise some weights could never be trained, or would be trained twice."""
    covered = torch.zeros(grid.rows, grid.cols, dtype=torch.int)
    down, across = grid.shape
    for row in range(down):
        for col in range(across):
            assert (row, col) in grid
            covered[grid.row_slice(row), grid.col_slice(col)] += 1
    assert covered.eq(1).all()
    assert len(grid) == down * across
    assert len(grid) * grid.block_elements == grid.rows * grid.cols
    assert all(block not in grid for block in [(down, 0), (0, across), (-1, 0), (0, -1)])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(grids_with_blocks())
def test_reading_and_writing_blocks_touches_exactly_those(case):
    """A merge that writes beside its blocks damages the base."""
    grid, blocks = case
    weight = torch.arange(float(grid.rows * grid.cols)).view(grid.rows, grid.cols)
    before = weight.clone()
    values = read_blocks(weight, grid, blocks)
    assert values.shape == (len(blocks) * grid.block_rows, grid.block_cols)
    write_blocks(weight, grid, blocks, -1 - values)
    changed = torch.zeros_like(weight, dtype=torch.bool)
    for row, col in blocks:
        changed[grid.row_slice(row), grid.col_slice(col)] = True
    assert torch.equal(weight, torch.where(changed, -1 - before, before))


@pytest.mark.parametrize("size", [(3, 4), (4, 3), (16, 4), (4, 16)])
def test_a_grid_needs_a_block_that_divides_it(size):
    """Left-over rows would silently stay untrained."""
    with pytest.raises(ValueError, match="8 x 8"):
        BlockGrid(8, 8, *size)


@pytest.mark.parametrize(
    ("shapes", "side"),
    [
        ([(576, 576), (192, 576)], 192),
        ([(4096, 4096), (1024, 4096)], 256),
        ([(512, 512)], 256),
        ([(300, 600)], 150),
        ([(40, 24)], 8),
    ],
)
def test_auto_is_the_largest_size_up_to_256_that_divides_every_target(shapes, side):
    """SmolLM2's 576 and 192 are no multiples of 256: "auto" is how such a model is tuned at all."""
    assert resolve_block_size("auto", dict(zip("abc", shapes, strict=False))) == (side, side)


@pytest.mark.parametrize(("size", "resolved"), [(4, (4, 4)), ((2, 8), (2, 8)), ((8, 16), (8, 16))])
def test_a_block_size_that_fits_is_taken_as_it_is(size, resolved):
    """A size that was asked for and fits may not be changed."""
    assert resolve_block_size(size, {Q: (8, 16), K: (16, 32)}) == resolved


@pytest.mark.parametrize("size", [256, 5, (8, 5), (64, 8)])
def test_a_block_size_that_does_not_divide_a_target_is_refused_with_one_that_does(size):
    """The user needs to know which weight and what would work; and the advice must be right."""
    shapes = {Q: (96, 96), K: (32, 96)}
    with pytest.raises(SMTError, match=r"block_size.*self_attn\.._proj \(\d+ x 96\); 32 fits every target") as caught:
        resolve_block_size(size, shapes)
    assert len(str(caught.value).splitlines()) == 1
    assert resolve_block_size(32, shapes) == (32, 32)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(grids_with_blocks(), st.randoms(use_true_random=False))
def test_the_file_of_a_selection_does_not_depend_on_the_order_it_was_made_in(case, random):
    """Equal choices are equal files: that is how runs, ranks and engines are compared."""
    grid, blocks = case
    shuffled = random.sample(blocks, len(blocks))
    make = lambda order: BlockSelection(  # noqa: E731
        block_size=(grid.block_rows, grid.block_cols), blocks={Q: order}, shapes={Q: (grid.rows, grid.cols)}
    )
    selection = make(blocks)
    assert selection.blocks[Q] == sorted(blocks)
    assert make(shuffled).to_json() == selection.to_json()
    assert len(selection) == len(blocks)
    assert selection.parameters == len(blocks) * grid.block_elements


def test_a_selection_survives_its_file_byte_for_byte(tmp_path):
    """Checkpoints, adapters and `--selection` all go through this file."""
    selection = BlockSelection(
        block_size=(4, 8), blocks={Q: [(1, 0), (0, 1)], K: [(0, 0)]}, shapes={Q: (8, 16), K: (4, 16)}, groups={Q: "a"}
    )
    path = tmp_path / "selection.json"
    path.write_text(selection.to_json())
    again = BlockSelection.from_json_file(path)
    assert again == selection
    assert again.to_json() == path.read_text()
    content = json.loads(path.read_text())
    assert content["format_version"] == 1
    assert content["block_size"] == [4, 8]
    assert content["blocks"] == {Q: [[0, 1], [1, 0]], K: [[0, 0]]}
    assert list(content) == ["format_version", "block_size", "blocks", "shapes", "groups"]


def test_a_selection_by_hand_needs_only_size_and_blocks():
    """The documented way to write one in Python."""
    selection = BlockSelection(block_size=(256, 256), blocks={Q: [(0, 0)]})
    assert selection.block_size == (256, 256)
    assert selection.blocks == {Q: [(0, 0)]}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (selection_json(blocks={Q: [[0, 1], [0, 1]]}), "blocks.*q_proj.*twice"),
        (selection_json(blocks={Q: [[-1, 0]]}), "blocks.*q_proj.*negative"),
        (selection_json(blocks={Q: [[0, -1]]}), "blocks.*q_proj.*negative"),
        (selection_json(blocks={Q: []}), "blocks.*q_proj.*empty"),
        (selection_json(blocks={}), "blocks"),
        (selection_json(blocks={Q: [[0]]}), "blocks.*q_proj"),
        (selection_json(blocks={Q: [[0, 1, 2]]}), "blocks.*q_proj"),
        (selection_json(blocks={Q: [[0, 1.0]]}), "blocks.*q_proj"),
        (selection_json(blocks={Q: [[0, "1"]]}), "blocks.*q_proj"),
        (selection_json(blocks={Q: [[0, True]]}), "blocks.*q_proj"),
        (selection_json(blocks={Q: 3}), "blocks.*q_proj"),
        (selection_json(blocks={Q: [[2, 0]]}), r"q_proj: block \(2, 0\) lies outside its 2 x 2 grid"),
        (selection_json(blocks={Q: [[0, 2]]}), r"q_proj: block \(0, 2\) lies outside its 2 x 2 grid"),
        (selection_json(block_size=[3, 8]), "q_proj.*8 x 16.*3 x 8"),
        (selection_json(block_size=[0, 8]), "block_size"),
        (selection_json(block_size=[4]), "block_size"),
        (selection_json(block_size="4"), "block_size"),
        (selection_json(shapes={Q: [0, 0]}), "shapes|q_proj"),
        (selection_json(format_version=2), "format_version"),
        (selection_json(extra=1), "extra"),
        ('{"block_size": [4, 8]}', "blocks"),
        ("[]", "top level"),
        ("nothing", "not valid JSON"),
        ("", "not valid JSON"),
    ],
)
def test_a_malformed_selection_file_is_refused_by_file_and_field(tmp_path, text, problem):
    """A file edited by hand or cut short may not be half believed."""
    path = tmp_path / "selection.json"
    path.write_text(text)
    with pytest.raises(SMTError, match=problem) as caught:
        BlockSelection.from_json_file(path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value).splitlines()) == 1


def test_a_selection_is_refused_for_a_weight_of_another_shape():
    """The same names with other sizes are another model: its blocks lie elsewhere."""
    selection = BlockSelection(block_size=(4, 8), blocks={Q: [(0, 1)]}, shapes={Q: (8, 16)})
    assert len(selection.grid(Q, (8, 16))) == 4
    with pytest.raises(SMTError, match=r"q_proj was \(8, 16\).*\(16, 16\)"):
        selection.grid(Q, (16, 16))
    unknown_shape = BlockSelection(block_size=(4, 8), blocks={Q: [(3, 1)]})
    with pytest.raises(SMTError, match=r"q_proj: block \(3, 1\) lies outside its 2 x 2 grid"):
        unknown_shape.grid(Q, (8, 16))


def test_auto_refuses_crumbs_and_names_the_odd_weight():
    """One weight with odd sides (a head of 50257 rows) would cut every target into blocks of one element."""
    with pytest.raises(SMTError, match="lm_head is 50257 x 768"):
        resolve_block_size("auto", {"q_proj": (768, 768), "lm_head": (50257, 768)})
