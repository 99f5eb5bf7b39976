"""Build padded batches from data rows: labels, truncation, packing and collation."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import PreTrainedTokenizerBase

from smt_dist.data.prompts import PromptStyle, encode_instruction, encode_messages, encode_text, require_eos_token
from smt_dist.data.rows import Rows, check_rows, load_hub_rows, read_rows
from smt_dist.distributed import get_rank
from smt_dist.errors import SMTError

logger = logging.getLogger(__name__)

IGNORED = -100  # the label that torch's cross-entropy skips


@dataclass(frozen=True)
class DataReport:
    """Count what happened to the rows; rank 0 logs :meth:`summary`.

    Attributes:
        rows: rows read.
        truncated: rows longer than ``max_seq_length`` tokens.
        dropped: rows without any label to train (usually because truncation removed the whole answer).
        sequences: rows of the resulting data set; fewer than ``rows - dropped`` when packed.
        tokens: tokens in these sequences, without padding.
        trained_tokens: tokens with a label.
    """

    rows: int
    truncated: int
    dropped: int
    sequences: int
    tokens: int
    trained_tokens: int

    def summary(self, max_seq_length: int) -> str:
        """Return the counts as one line of text."""
        return (
            f"{self.rows} rows -> {self.sequences} sequences, {self.tokens} tokens "
            f"({self.trained_tokens} trained); {self.truncated} rows ({self.truncated / self.rows:.1%}) "
            f"truncated to {max_seq_length} tokens, {self.dropped} dropped with no label left to train"
        )


def load_rows(
    train_file: str | Path | None = None,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    split: str = "train",
) -> Rows:
    """Load the rows of a file or of a hub data set.

    Raises:
        SMTError: not exactly one of ``train_file`` and ``dataset_name`` is given, or it can't be read.
    """
    if (train_file is None) == (dataset_name is None):
        raise SMTError("give either a data file or a data set's hub name: exactly one of the two")
    return read_rows(train_file) if train_file is not None else load_hub_rows(dataset_name, dataset_config, split)


def get_pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the pad token, or of EOS if there is none.

    Adding a pad token would resize the embeddings of a frozen model.
    """
    return require_eos_token(tokenizer) if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def build_dataset(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_seq_length: int,
    prompt_style: PromptStyle = "plain",
    packing: bool = False,
) -> tuple[datasets.Dataset, DataReport]:
    """Tokenise ``rows``, in order, into sequences of at most ``max_seq_length`` tokens.

    The columns are ``input_ids`` and ``labels`` (the id of a trained token, -100 elsewhere and at each example's
    first token, which isn't predicted), and ``attention_mask``, or when packed ``position_ids`` that restart at
    every example. transformers then keeps packed examples from attending to one another, if the model was
    prepared by :func:`smt_dist.models.packing.prepare_model_for_packing`.

    Everything is kept in memory, so ranks can't race for a cache file.

    Returns:
        The data set and the counts.

    Raises:
        SMTError: a row is malformed (names it), or no row has a label to train.
    """
    if max_seq_length < 2:
        raise SMTError(f"max_seq_length must be at least 2 tokens, not {max_seq_length}")
    dataset = _tokenize(rows, tokenizer, max_seq_length, prompt_style)
    kept = [index for index, count in enumerate(dataset["trained_tokens"]) if count]
    if not kept:
        raise SMTError(
            f"{rows.source}: no row has a label to train within max_seq_length={max_seq_length} tokens "
            "(answers start later, or no message is the assistant's)"
        )
    truncated, trained_tokens = sum(dataset["truncated"]), sum(dataset["trained_tokens"])
    dataset = dataset.select(kept).remove_columns(["truncated", "trained_tokens"])
    lengths = [len(ids) for ids in dataset["input_ids"]]
    if packing:
        dataset = pack(dataset, pack_lengths(lengths, max_seq_length))
    else:
        dataset = dataset.add_column("attention_mask", [[1] * length for length in lengths])
    report = DataReport(
        rows=len(rows),
        truncated=truncated,
        dropped=len(rows) - len(kept),
        sequences=len(dataset),
        tokens=sum(lengths),
        trained_tokens=trained_tokens,
    )
    if get_rank() == 0:
        logger.info("%s: %s", rows.source, report.summary(max_seq_length))
    return dataset, report


def _tokenize(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, max_seq_length: int, prompt_style: PromptStyle
) -> datasets.Dataset:
    """Tokenise each row to ``input_ids``, ``labels``, ``truncated`` and ``trained_tokens``."""
    require_eos_token(tokenizer)
    encode = {
        "instruction": lambda index: encode_instruction(rows[index], tokenizer, prompt_style),
        "messages": lambda index: encode_messages(rows, index, tokenizer),
        "text": lambda index: encode_text(rows[index]["text"], tokenizer),
    }[check_rows(rows)]

    def to_example(index: int) -> dict[str, Any]:
        ids, trained = encode(index)
        labels = [token if learn else IGNORED for token, learn in zip(ids, trained, strict=True)]
        labels = [IGNORED, *labels[1:max_seq_length]]
        return {
            "input_ids": ids[:max_seq_length],
            "labels": labels,
            "truncated": len(ids) > max_seq_length,
            "trained_tokens": sum(label != IGNORED for label in labels),
        }

    with _progress_bar_on_rank_zero():
        return datasets.Dataset.from_dict({"index": range(len(rows))}).map(
            to_example,
            input_columns="index",
            remove_columns="index",
            keep_in_memory=True,
            # Without a given fingerprint, `datasets` would pickle and hash the tokenizer.
            new_fingerprint="smt-dist-tokenized",
            desc=f"Tokenising {rows.source}",
        )


def pack_lengths(lengths: list[int], capacity: int, open_bins: int = 64) -> list[list[int]]:
    """Pack examples by first-fit: each goes, in order, into the first open sequence with room.

    Args:
        lengths: tokens of each example, none above ``capacity``.
        capacity: tokens of a sequence.
        open_bins: the oldest sequence is closed when more than this many are open, so that the time is linear.

    Returns:
        For every sequence, the indices of its examples, ascending.
    """
    bins: list[list[int]] = []
    room: dict[int, int] = {}  # open sequence -> tokens left, oldest first
    for index, length in enumerate(lengths):
        chosen = next((bin_index for bin_index, left in room.items() if left >= length), None)
        if chosen is None:
            chosen = len(bins)
            bins.append([])
            room[chosen] = capacity
        bins[chosen].append(index)
        room[chosen] -= length
        if room[chosen] == 0 or len(room) > open_bins:
            del room[chosen if room[chosen] == 0 else next(iter(room))]
    return bins


def trained_tokens(batch: Mapping[str, Any], loss_shifts_labels: bool = True) -> torch.Tensor:
    """Count the labels of a batch that the loss is computed on, as Trainer does.

    Args:
        batch: with ``labels``, or with ``shift_labels``, which are already shifted to the logits' positions.
        loss_shifts_labels: whether the model predicts each label from the tokens before it, and so never the first.

    Returns:
        An int64 scalar on the labels' device.
    """
    if batch.get("shift_labels") is not None:
        return (batch["shift_labels"] != IGNORED).sum()
    labels = batch["labels"]
    return ((labels[..., 1:] if loss_shifts_labels else labels) != IGNORED).sum()


@dataclass(frozen=True)
class CausalLMCollator:
    """Pad examples of :func:`build_dataset` on the right, to ``[batch, length]`` int64 tensors.

    In a packed batch the padding is one more segment: its positions restart at 0, so no example attends to it.

    Attributes:
        pad_token_id: see :func:`get_pad_token_id`.
        pad_to_multiple_of: round ``length`` up to a multiple of this.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        longest = max(len(example["input_ids"]) for example in examples)
        if self.pad_to_multiple_of:
            longest += -longest % self.pad_to_multiple_of
        batch = {}
        for name in ("input_ids", "labels", "attention_mask", "position_ids"):
            if name in examples[0]:
                columns = [list(example[name]) for example in examples]
                padded = [column + self._padding(name, longest - len(column)) for column in columns]
                batch[name] = torch.tensor(padded, dtype=torch.int64)
        return batch

    def _padding(self, name: str, count: int) -> list[int]:
        if name == "position_ids":
            return list(range(count))
        return [{"input_ids": self.pad_token_id, "labels": IGNORED, "attention_mask": 0}[name]] * count


def pack(dataset: datasets.Dataset, bins: list[list[int]]) -> datasets.Dataset:
    """Join the examples of each bin of :func:`pack_lengths`; positions restart at every example."""
    ids, labels = dataset["input_ids"][:], dataset["labels"][:]
    return datasets.Dataset.from_dict(
        {
            "input_ids": [[token for index in members for token in ids[index]] for members in bins],
            "labels": [[label for index in members for label in labels[index]] for members in bins],
            "position_ids": [[p for index in members for p in range(len(ids[index]))] for members in bins],
        }
    )


@contextmanager
def _progress_bar_on_rank_zero() -> Iterator[None]:
    hide = get_rank() != 0 and not datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()
