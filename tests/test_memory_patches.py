"""A plan replaces parts of other libraries while it runs, and leaves them as they were, whatever ends it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from transformers import masking_utils

from smt_dist.memory.plan import patches
from smt_dist.memory.plan.tracker import MemoryTracker
from smt_dist.memory.plan.zero_linear import linear_of

# Name of the context -> (what makes it, whose attribute it replaces, the attribute).
PATCHES = {
    "linear_function": (lambda: patches.linear_function(torch.matmul), nn.functional, "linear"),
    "unpacked_rows": (patches.unpacked_rows, masking_utils, "find_packed_sequence_indices"),
    "modules_that_stay": (patches.modules_that_stay, nn.Module, "to"),
    "watched_resizes": (lambda: patches.watched_resizes(lambda _: None), torch.UntypedStorage, "resize_"),
    "unseen_shape_propagation": (
        patches.unseen_shape_propagation, ShardingPropagator, "_propagate_tensor_meta_non_cached",
    ),
    "MemoryTracker": (MemoryTracker, torch.UntypedStorage, "resize_"),
    "linear_of": (lambda: linear_of("zero3"), nn.functional, "linear"),
}  # fmt: skip
each_patch = pytest.mark.parametrize(("make", "owner", "name"), PATCHES.values(), ids=PATCHES)


def test_every_patch_is_tested_here():
    """One that isn't could stay in force after a plan: in a training that is profiled, too."""
    made_here = {name for name, value in vars(patches).items() if getattr(value, "__module__", "") == patches.__name__}
    assert made_here - {"_replaced"} == set(PATCHES) - {"MemoryTracker", "linear_of"}


@each_patch
def test_what_is_replaced_exists_in_the_installed_library(make, owner, name):  # noqa: ARG001
    """An upgrade that moves it must be seen here, not in a plan that is wrong."""
    assert callable(getattr(owner, name))


@each_patch
@pytest.mark.parametrize("error", [None, KeyError])
def test_a_patch_is_in_force_inside_and_gone_after(make, owner, name, error):
    """Also after an exception, and with nothing left in a class that had inherited it."""

    def go_in(patch: AbstractContextManager) -> None:
        with patch:
            assert getattr(owner, name) is not before[0]
            if error is not None:
                raise error

    before = getattr(owner, name), name in vars(owner)
    if error is None:
        go_in(make())
    else:
        with pytest.raises(error):
            go_in(make())
    assert (getattr(owner, name), name in vars(owner)) == before


def test_what_is_not_there_is_not_replaced():
    """A part that was renamed: setting it would change nothing, and the plan would be of another run."""
    with pytest.raises(AttributeError, match="nosuch"), patches._replaced(nn.Module, "nosuch", None):
        pass
    assert not hasattr(nn.Module, "nosuch")


def test_patches_do_what_their_names_say():
    """Each by one call of what it replaces."""
    resized = []
    tensor = torch.ones(4)
    with patches.watched_resizes(resized.append), patches.modules_that_stay(), patches.unpacked_rows():
        tensor.untyped_storage().resize_(64)
        layer = nn.Linear(2, 2)
        assert layer.to(torch.bfloat16).weight.dtype == torch.float32
        assert masking_utils.find_packed_sequence_indices(torch.zeros(1, 2)) is None
    assert [storage.nbytes() for storage in resized] == [64]
    with patches.linear_function(lambda x, *_: x + 1):
        assert torch.equal(layer(torch.ones(2)), torch.full((2,), 2.0))
    assert masking_utils.find_packed_sequence_indices(torch.zeros(1, 2)) is not None


def test_the_package_imports_nothing_of_unittest():
    """What replaces another library's part there has a name and a reason, in one file."""
    root = Path(patches.__file__).parents[2]
    assert [str(path.relative_to(root)) for path in root.rglob("*.py") if "unittest" in path.read_text()] == []
