"""Compute the loss over chunks of the vocabulary, without the whole logits.

A head that FSDP2 shards is never gathered whole either. A causal language model's loss needs, of each token's logits,
their maximum, their sum of exponentials and the label's logit. These three and the gradient of the hidden state are
carried from chunk to chunk, and rescaled whenever the maximum rises (the online softmax of arXiv 1805.02867). The head
is frozen and gets no gradient, so the backward doesn't need it again.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from smt_dist.distributed import all_gather_rows
from smt_dist.errors import first_line

logger = logging.getLogger(__name__)

IGNORED = -100
CHUNK = 4096


def chunk_loss(model: PreTrainedModel, entries: int = CHUNK, targets: Collection[str] = ()) -> bool:
    """Make ``model`` compute its loss over chunks of the vocabulary when it gets labels.

    Its output then has no logits. Without labels the model computes as before. A second call changes nothing.

    Args:
        model: a causal language model; whole, sharded by FSDP2 or partitioned by ZeRO-3. While its head is trained
            (requires a gradient), the loss is computed as before.
        entries: vocabulary entries of one chunk; 0: don't change the model.
        targets: modules that have blocks or can get them; a head among them needs its gradient and isn't changed.

    Returns:
        Whether the loss is chunked. If not, the log says why: a head with a bias or blocks, or a model that
        changes its logits before the loss (caps or scales them) or has its own loss.
    """
    if entries == 0:
        return False
    head = model.get_output_embeddings()
    if isinstance(head, ChunkedLossHead):
        return True
    reason = _why_not(model, head, targets)
    if reason is not None:
        logger.info("the loss isn't chunked over the vocabulary: %s", reason)
        return False
    name = next(name for name, module in model.named_modules() if module is head)
    chunked = ChunkedLossHead(head, entries)
    model.set_submodule(name, chunked)
    whole_loss = model.loss_function
    model.loss_function = lambda logits, labels, vocab_size, **options: (
        logits if chunked.answered else whole_loss(logits, labels, vocab_size, **options)
    )
    model.register_forward_pre_hook(chunked.begin, with_kwargs=True)
    model.register_forward_hook(chunked.end, always_call=True)
    return True


class _Question(NamedTuple):
    labels: torch.Tensor  # [batch, tokens]
    num_items: torch.Tensor | int | None


class ChunkedLossHead(nn.Module):
    """Replace a model's head; return the loss instead of logits if the model got labels.

    Args:
        head: a linear layer without a bias, its weight ``[vocabulary, hidden]``.
        entries: vocabulary entries of one chunk.

    Attributes:
        answered: whether the last output is the loss.
    """

    def __init__(self, head: nn.Module, entries: int) -> None:
        super().__init__()
        self.head = head
        self.entries = entries
        self.answered = False
        self.is_whole = False
        self._question: _Question | None = None

    @property
    def weight(self) -> torch.Tensor:
        """Return the head's weight, for code that reads its dtype."""
        # Not self.head.weight: after that attribute is read in a forward, ZeRO-3 gathers it in every later forward.
        return next(self.head.parameters())

    def begin(self, _model: nn.Module, _args: tuple, options: dict[str, Any]) -> None:
        """Keep the labels for the head, as a forward pre-hook of the model."""
        labels = options.get("labels")
        special = options.get("shift_labels") is not None or options.get("ignore_index", IGNORED) != IGNORED
        if self.is_whole or labels is None or special or not _keeps_all(options.get("logits_to_keep", 0)):
            return
        self._question = _Question(labels, options.get("num_items_in_batch"))

    def end(self, _model: nn.Module, _args: tuple, output: Any) -> Any:
        """Remove the loss from the output's ``logits``, as a forward hook of the model."""
        if self.answered and output is not None and "logits" in output:
            output["logits"] = None
        self._question, self.answered = None, False
        return output

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute the loss, or the logits without labels.

        Args:
            hidden: ``[batch, tokens, hidden]``.

        Returns:
            The loss, an fp32 scalar; or ``[batch, tokens, vocabulary]``.
        """
        question = self._question
        weight = self.weight
        trained = weight.requires_grad and torch.is_grad_enabled()  # then the weight needs a gradient
        if question is None or trained or question.labels.shape != hidden.shape[:-1]:
            return self.head(hidden)
        self.answered = True
        targets = pad(question.labels, (0, 1), value=IGNORED)[..., 1:].reshape(-1).to(hidden.device)
        items = (targets != IGNORED).sum() if question.num_items is None else question.num_items
        items = items.to(hidden.device) if isinstance(items, torch.Tensor) else items
        with _gathered_by_zero(weight):
            return _ChunkedLoss.apply(hidden.reshape(-1, hidden.shape[-1]), targets, items, weight, self.entries)


@contextmanager
def whole_logits(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Let the model's head return whole logits inside the context, where they are wanted."""
    heads = [module for module in model.modules() if isinstance(module, ChunkedLossHead)] if wanted else []
    for head in heads:
        head.is_whole = True
    try:
        yield
    finally:
        for head in heads:
            head.is_whole = False


def _keeps_all(logits_to_keep: Any) -> bool:
    return isinstance(logits_to_keep, int) and logits_to_keep == 0


@contextmanager
def _gathered_by_zero(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    if not hasattr(weight, "ds_id"):
        yield weight
        return
    import deepspeed  # slow to import, and only ZeRO-3 needs it

    with deepspeed.zero.GatheredParameters([weight]):
        yield weight


class _ChunkedLoss(torch.autograd.Function):
    """Compute the cross entropy of ``hidden @ weight^T``, and ``hidden``'s gradient with it."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, targets: torch.Tensor, items: Any, weight: torch.Tensor, entries: int
    ) -> torch.Tensor:
        state = _Online.zeros(hidden, ctx.needs_input_grad[0])
        for chunk in _chunks(weight.detach(), entries):
            state.add(hidden, targets, chunk)
        counted = targets != IGNORED
        loss = ((state.maximum + state.total.log() - state.picked) * counted).sum() / items
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(state.gradient(counted / items).to(hidden.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss.to(gradient.dtype), None, None, None, None


class _Chunk(NamedTuple):
    """Hold some rows of a head's weight, equally many of each owner.

    An owner is a rank that holds ``per_owner`` consecutive vocabulary entries. Its row ``row`` in the chunk is that of
    entry ``owner * per_owner + first + row``.
    """

    weight: torch.Tensor  # [owners * rows, hidden]
    rows: int  # of each owner
    first: int  # of an owner's entries
    per_owner: int
    vocabulary: int

    def find(self, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return for each target whether its row is in the chunk, and which row it is (0 if not)."""
        row = targets % self.per_owner - self.first
        here = (targets >= 0) & (row >= 0) & (row < self.rows)
        return here, torch.where(here, targets // self.per_owner * self.rows + row, 0)

    def padding(self) -> torch.Tensor | None:
        """Return a mask of the rows without an entry (the last owners can have fewer); None if none."""
        owners = len(self.weight) // self.rows
        if owners * self.per_owner == self.vocabulary and self.first + self.rows <= self.per_owner:
            return None
        index = torch.arange(len(self.weight), device=self.weight.device)
        place = self.first + index % self.rows
        return (place >= self.per_owner) | (index // self.rows * self.per_owner + place >= self.vocabulary)


def _chunks(weight: torch.Tensor, entries: int) -> Iterator[_Chunk]:
    """Yield a weight's rows in chunks: views of a whole weight, or gathered from a sharded one."""
    vocabulary = weight.shape[0]
    if not isinstance(weight, DTensor):
        for first in range(0, vocabulary, entries):
            rows = weight[first : first + entries]
            yield _Chunk(rows, len(rows), first, vocabulary, vocabulary)
        return
    mesh_dim = weight.placements.index(Shard(0))
    group, owners = weight.device_mesh.get_group(mesh_dim), weight.device_mesh.size(mesh_dim)
    own, per_owner = weight.to_local(), -(-vocabulary // owners)
    rows = min(per_owner, max(1, entries // owners))
    for first in range(0, per_owner, rows):
        part = own[first : first + rows]
        part = pad(part, (0, 0, 0, rows - len(part)))
        whole = part.new_empty(owners * rows, part.shape[1])
        all_gather_rows(whole, part, group)
        yield _Chunk(whole, rows, first, per_owner, vocabulary)


class _Online:
    """Hold the state that is carried from chunk to chunk, in fp32 except for the labels' rows.

    Attributes:
        maximum: of each token's logits, ``[tokens]``.
        total: sum of exponentials of logits minus the maximum, ``[tokens]``.
        picked: the label's logit, ``[tokens]``.
    """

    def __init__(self, maximum: torch.Tensor, hidden: torch.Tensor | None) -> None:
        self.maximum, self.total, self.picked = maximum, torch.zeros_like(maximum), torch.zeros_like(maximum)
        # For the gradient: the rows weighted by the exponentials, and the label's row; both [tokens, hidden].
        self._weighted = None if hidden is None else torch.zeros_like(hidden, dtype=torch.float32)
        self._label_row = None if hidden is None else torch.zeros_like(hidden)

    @staticmethod
    def zeros(hidden: torch.Tensor, with_gradient: bool) -> _Online:
        maximum = torch.full((len(hidden),), -torch.inf, device=hidden.device)
        return _Online(maximum, hidden if with_gradient else None)

    def add(self, hidden: torch.Tensor, targets: torch.Tensor, chunk: _Chunk) -> None:
        """Add one chunk; logits are computed in the weight's dtype, as by the head."""
        weight = chunk.weight.to(hidden.device)
        logits = (hidden.to(weight.dtype) @ weight.t()).float()
        if (padding := chunk.padding()) is not None:
            logits.masked_fill_(padding, -torch.inf)
        here, row = chunk.find(targets)
        self.picked += torch.where(here, logits.gather(1, row[:, None])[:, 0], 0)
        maximum = torch.maximum(self.maximum, logits.amax(1))
        fade = (self.maximum - maximum).exp_()
        self.maximum = maximum
        logits.sub_(maximum[:, None]).exp_()
        self.total.mul_(fade).add_(logits.sum(1))
        if self._weighted is not None:
            self._weighted.mul_(fade[:, None]).add_(logits.to(weight.dtype) @ weight)
            self._label_row = torch.where(here[:, None], weight[row], self._label_row)

    def gradient(self, scale: torch.Tensor) -> torch.Tensor:
        """Return the gradient ``[tokens, hidden]`` of the sum of each token's loss times its scale.

        The state is overwritten and can't be used afterwards.
        """
        return self._weighted.div_(self.total[:, None]).sub_(self._label_row).mul_(scale[:, None])


# -- whether a model's loss is the plain cross entropy of its head's output -------------------------------------------


def _why_not(model: PreTrainedModel, head: nn.Module | None, targets: Collection[str]) -> str | None:
    if not isinstance(head, nn.Linear) or head.bias is not None or not head.weight.is_floating_point():
        return f"the head isn't a plain linear layer without a bias ({type(head).__name__})"
    names = [name for name, module in model.named_modules() if module is head]
    if len(names) != 1 or any(target == names[0] or target.startswith(f"{names[0]}.") for target in targets):
        return f"{', '.join(names)} can get blocks"
    try:
        plain = _uses_plain_loss(model, names[0])
    except Exception as error:
        return f"{type(model).__name__} can't be tested ({first_line(error)})"
    return None if plain else f"{type(model).__name__} changes its logits before the loss, or has its own loss"


def _uses_plain_loss(model: PreTrainedModel, head_name: str) -> bool:
    """Return whether the head's output reaches the usual loss unchanged.

    The model's own forward is run on a stand-in on the meta device, without layers.
    """
    config = copy.deepcopy(model.config)
    config.get_text_config(decoder=True).num_hidden_layers = 1
    config.output_router_logits = False  # a term that is added to the loss later doesn't matter here
    with torch.device("meta"):
        stand_in = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    if stand_in.loss_function.__name__ != "ForCausalLMLoss":
        return False
    given = torch.zeros(())
    seen: list[tuple[torch.Tensor, dict[str, Any]]] = []
    setattr(stand_in, stand_in.base_model_prefix, _Nothing())
    stand_in.set_submodule(head_name, _Gives(given))
    stand_in.loss_function = lambda logits, labels, vocab_size, **options: (  # noqa: ARG005
        seen.append((logits, options)) or torch.zeros(())
    )
    tokens = torch.zeros(1, 2, dtype=torch.long)
    stand_in(input_ids=tokens, labels=tokens, num_items_in_batch=1, use_cache=False)
    ((logits, options),) = seen
    return logits is given and given._version == 0 and options.get("num_items_in_batch") == 1


class _Nothing(nn.Module):
    """Replace a model's layers, and return zeros."""

    def forward(self, *_: Any, **__: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=torch.zeros(1, 2, 1))


class _Gives(nn.Module):
    """Replace a head, and return a given tensor."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, _: torch.Tensor) -> torch.Tensor:
        return self.value
