"""Fingerprint the training data and its order, to compare them between ranks."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from typing import Any

import datasets
import pyarrow as pa
from accelerate.data_loader import DataLoaderDispatcher
from torch.utils.data import Sampler

_ROWS = 1000


class HashedSampler(Sampler[int]):
    """Yield another sampler's indices, with a fingerprint of each epoch's order.

    Args:
        sampler: to draw from; its ``set_epoch`` is passed on.

    Attributes:
        digest: of the epoch that was begun last, as a signed 64-bit number; 0 before the first.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.digest = 0

    def __iter__(self) -> Iterator[int]:
        order = list(self.sampler)  # as many numbers as torch's own samplers draw at once
        self.digest = _as_int64(hashlib.blake2b(array("q", order).tobytes(), digest_size=8))
        return iter(order)

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, for samplers that shuffle by it."""
        if hasattr(self.sampler, "set_epoch"):
            self.sampler.set_epoch(epoch)


def watch_order(loader: Any) -> HashedSampler | None:
    """Wrap the sampler of one of accelerate's data loaders in a :class:`HashedSampler`.

    Returns None where no order of rows can be compared: the data is iterable, or one rank reads for all.
    """
    sampler = loader.get_sampler() if hasattr(loader, "get_sampler") else None
    # A sampler without a length may never end, as torch's for iterable data.
    if sampler is None or not hasattr(sampler, "__len__") or isinstance(loader, DataLoaderDispatcher):
        return None
    hashed = HashedSampler(sampler)
    loader.set_sampler(hashed)
    return hashed


def dataset_digest(dataset: Any) -> bytes:
    """Hash the rows in their order; empty for data that isn't a ``datasets.Dataset``."""
    digest = hashlib.blake2b(digest_size=16)
    if not isinstance(dataset, datasets.Dataset):
        return b""
    for table in dataset.with_format("arrow").iter(batch_size=_ROWS):
        # Arrow's stream format has neither offsets into larger buffers nor metadata that differs between processes.
        sink = pa.BufferOutputStream()
        plain = table.replace_schema_metadata(None).combine_chunks()
        with pa.ipc.new_stream(sink, plain.schema) as stream:
            stream.write_table(plain)
        digest.update(sink.getvalue())
    return digest.digest()


def _as_int64(digest: Any) -> int:
    return int.from_bytes(digest.digest(), "little", signed=True)
