"""Small seeded models and rows that every test can make for itself, and the loss written out for dense references."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import datasets
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 100
IGNORED = -100


def save_tiny_llama(folder: Path, *, layers: int = 2, seed: int = 0, **overrides) -> Path:
    """A random Llama with grouped queries; no two kinds of target weights share a shape, nor do their halves."""
    torch.manual_seed(seed)
    options = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        # Large enough for attention to look somewhere: with 0.02, gradients of queries and keys are noise.
        "initializer_range": 0.15,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    LlamaForCausalLM(LlamaConfig(**(options | overrides))).save_pretrained(folder)
    return folder


def make_rows(count: int, seed: int = 0, unlabelled: tuple[int, ...] = ()) -> datasets.Dataset:
    """Rows of 4 to 15 tokens with prompts of different lengths masked.

    Args:
        count: number of rows.
        seed: of lengths and tokens.
        unlabelled: rows whose every label is masked.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        length = int(torch.randint(4, 16, (), generator=generator))
        prompt = length if index in unlabelled else int(torch.randint(1, length - 1, (), generator=generator))
        ids = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:], "attention_mask": [1] * length})
    return datasets.Dataset.from_list(rows)


def sum_of_token_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss written out: cross entropy of each label given the tokens before it, added up."""
    log_probabilities = logits[:, :-1].float().log_softmax(-1)
    targets = labels[:, 1:]
    picked = log_probabilities.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return -(picked * (targets != IGNORED)).sum()


def label_tokens(labels: torch.Tensor) -> int:
    """How many tokens are predicted."""
    return int((labels[:, 1:] != IGNORED).sum())


class RoutedModel(nn.Module):
    """A toy mixture of experts whose routing is in the data: token t goes to expert ``t % experts``.

    The middle layer as a whole is skipped unless a batch holds a token of at least ``VOCABULARY // 2``, and the
    ``shared`` module of the first layer is used once more at the end, so that its gradient comes out of order.
    The forward takes no extra keywords and returns a mean loss, as models outside transformers do.
    """

    def __init__(self, width: int = 16, experts: int = 3, layers: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "experts": nn.ModuleList(nn.Linear(width, width) for _ in range(experts)),
                    "shared": nn.Linear(width, width),
                }
            )
            for _ in range(layers)
        )
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
        hidden = self.embedding(input_ids)
        for index, layer in enumerate(self.layers):
            if index == 1 and int(input_ids.max()) < VOCABULARY // 2:
                continue
            hidden = hidden + torch.tanh(layer["shared"](hidden))
            mixed = torch.zeros_like(hidden)
            for number, expert in enumerate(layer["experts"]):
                own = input_ids % len(layer["experts"]) == number
                if own.any():
                    mixed = mixed.index_put((own,), torch.tanh(expert(hidden[own])))
            hidden = hidden + mixed
        hidden = hidden + torch.tanh(self.layers[0]["shared"](hidden))
        logits = self.head(hidden)
        # The mean over no label is NaN, as PyTorch's cross entropy has it.
        return SimpleNamespace(loss=sum_of_token_losses(logits, labels) / label_tokens(labels), logits=logits)
