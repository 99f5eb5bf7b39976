"""Replace parts of other libraries for a plan or a recording.

All such replacements are here, and each is in force only inside its context.

Checked on torch 2.13.0, deepspeed 0.19.8 and transformers 5.23.0. A part that an upgrade renames is an AttributeError
on entering; ``tests/test_memory_patches.py`` asks for all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import _disable_current_modes
from transformers import masking_utils


def linear_function(function: Callable[..., torch.Tensor]) -> AbstractContextManager[None]:
    """Replace ``torch.nn.functional.linear``, as DeepSpeed's ZeRO-3 does.

    No public way: deepspeed 0.19.8 assigns the same attribute itself, in ``zero.Init``, which needs real parameters.
    """
    return _replaced(nn.functional, "linear", function)


def unpacked_rows() -> AbstractContextManager[None]:
    """Replace the question of transformers' masks whether rows are packed by "no".

    It reads the values of the positions, which fake tensors don't have. No public way (transformers 5.23.0): only a
    cache or an attention mask keeps it from being asked, and those take memory that the training doesn't.
    """
    return _replaced(masking_utils, "find_packed_sequence_indices", lambda _position_ids: None)


def modules_that_stay() -> AbstractContextManager[None]:
    """Replace ``nn.Module.to`` by one that leaves the module as and where it is.

    It fails on fake tensors (torch 2.13.0: "Couldn't swap Linear.weight"). No public way: PEFT moves each adapter that
    it makes to its base layer's device, wherever it is already.
    """
    return _replaced(nn.Module, "to", lambda module, *_args, **_kwargs: module)


def watched_resizes(on_resize: Callable[[torch.UntypedStorage], None]) -> AbstractContextManager[None]:
    """Replace ``UntypedStorage.resize_`` by one that then calls ``on_resize`` with the storage.

    FSDP2 frees and fills whole weights by it. It is no operation, so a dispatch mode never sees it, and torch 2.13.0
    has no other hook there.
    """
    original = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> Any:
        result = original(storage, size)
        on_resize(storage)
        return result

    return _replaced(torch.UntypedStorage, "resize_", resize_)


def unseen_shape_propagation() -> AbstractContextManager[None]:
    """Replace DTensor's working out of shapes by the same out of sight of dispatch modes.

    It makes tensors of the global size, which a mode would take for memory. It is private (torch 2.13.0), and nothing
    in a call that a mode sees tells these tensors from the run's own fake ones.
    """
    name = "_propagate_tensor_meta_non_cached"
    original = getattr(ShardingPropagator, name)

    def propagate(*args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes():
            return original(*args, **kwargs)

    return _replaced(ShardingPropagator, name, propagate)


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute of ``owner`` inside the context; it must exist before."""
    original, inherited = getattr(owner, name), name not in vars(owner)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, original)
