"""Tensors are written one at a time, as an ordinary safetensors file, or not at all."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch.multiprocessing.reductions import StorageWeakRef

from smt_dist.files import read_tensors, replace_file, write_tensors

SHAPES = {"a": (2, 3), "b": (1,), "c": (4, 1)}
LAYOUTS = ("as it is", "transposed", "every second", "needs a gradient")

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda n: n != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
kinds = st.tuples(shapes, st.sampled_from([torch.float32, torch.bfloat16, torch.float64]), st.sampled_from(LAYOUTS))


def make_tensor(shape: tuple[int, ...], dtype: torch.dtype, layout: str, seed: int) -> torch.Tensor:
    """Numbers of all sizes, infinities and -0.0 among them, in memory as ``layout`` says."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-40, 38, shape, generator=generator)
    flat = numbers.view(-1)
    flat[::5], flat[1::7] = -0.0, math.inf
    numbers = numbers.to(dtype)
    if layout == "transposed":
        return numbers.mT.contiguous().mT if numbers.dim() > 1 else numbers
    if layout == "every second":
        return torch.stack([numbers, torch.full_like(numbers, math.nan)], dim=-1)[..., 0]
    return numbers.requires_grad_(layout == "needs a gradient")


def tensors(**given: tuple[int, ...]) -> Iterator[tuple[str, torch.Tensor]]:
    """Random tensors of the given shapes."""
    for index, (name, shape) in enumerate(given.items()):
        yield name, make_tensor(shape, torch.float32, "as it is", index)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(names, kinds, max_size=5), st.dictionaries(names, st.text(max_size=8), max_size=1))
def test_file_is_read_back_bit_by_bit_by_the_safetensors_library(given, metadata):
    """Everybody else reads it with that library: a header it refuses, or a shifted offset, is a lost checkpoint."""
    written = {name: make_tensor(*kind, seed=index) for index, (name, kind) in enumerate(given.items())}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tensors.safetensors"
        write_tensors(path, {name: kind[0] for name, kind in given.items()}, iter(written.items()), metadata)
        with safe_open(path, framework="pt") as file:
            assert set(file.keys()) == set(written)
            assert (file.metadata() or {}) == metadata
            found = {name: file.get_tensor(name).clone() for name in written}
        assert read_tensors(path)[1] == metadata
    for name, tensor in written.items():
        assert found[name].dtype == torch.float32
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].view(torch.int32), tensor.detach().float().view(torch.int32))


def test_bytes_are_those_of_the_format(tmp_path):
    """Equal states are equal files: nothing of a clock, a hash seed or an address may be in them."""
    values = torch.tensor([[1.0, -2.0]])
    write_tensors(tmp_path / "file", {"w": (1, 2)}, [("w", values)], {"k": "v"})
    header = b'{"__metadata__": {"k": "v"}, "w": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}}'
    header += b" " * (-len(header) % 8)
    expected = len(header).to_bytes(8, "little") + header + bytes.fromhex("0000803f000000c0")
    assert (tmp_path / "file").read_bytes() == expected


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    """The writer of a checkpoint would otherwise hold two blocks at once, or in the end all of them."""
    alive = []

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        storages: list[StorageWeakRef] = []
        for name, shape in SHAPES.items():
            alive.append(sum(not storage.expired() for storage in storages))
            tensor = torch.ones(shape)
            storages.append(StorageWeakRef(tensor.untyped_storage()))
            holder = [tensor]
            del tensor
            yield name, holder.pop()  # not even this frame keeps it

    write_tensors(tmp_path / "file", SHAPES, stream(), {})
    assert alive == [0, 0, 0]
    kept = list(stream())
    assert len(kept) == 3
    assert alive[3:] == [0, 1, 2], "the count has to see tensors that are kept"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"a": (2, 3), "c": (4, 1), "b": (1,)}, r"c: .*expected b of \(1,\)"),
        ({"a": (2, 3), "b": (1,)}, r"nothing: .*expected c"),
        ({}, r"nothing: .*expected a"),
        (SHAPES | {"d": (1,)}, "d: one tensor too many"),
        (SHAPES | {"b": (0,)}, r"b: the tensor is \(0,\), expected b of \(1,\)"),
        (SHAPES | {"a": (3, 2)}, r"a: the tensor is \(3, 2\), expected a of \(2, 3\)"),
        (SHAPES | {"c": (4,)}, r"c: the tensor is \(4,\), expected c of \(4, 1\)"),
    ],
    ids=["misordered", "last missing", "all missing", "extra", "partitioned", "turned", "flat"],
)
def test_wrong_tensors_are_refused_and_leave_the_old_file(tmp_path, wrong, message):
    """A tensor in another's place has plausible bytes: nothing would notice until the training diverges."""
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError, match=message):
        replace_file(path, lambda beside: write_tensors(beside, SHAPES, tensors(**wrong), {}))
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]
