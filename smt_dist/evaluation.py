"""Generate greedy answers to ``instruction`` rows, and score them as LLM-Adapters does."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from smt_dist.data.dataset import get_pad_token_id
from smt_dist.data.prompts import PromptStyle, encode_prompt, format_prompt, require_eos_token
from smt_dist.data.rows import Rows
from smt_dist.errors import SMTError

AnswerKind = Literal["boolean", "answer", "option", "solution", "ending", "number", "letter"]

NUMBER_TOLERANCE = 1e-3  # absolute, as in LLM-Adapters
# A minus directly after a digit, a letter or a bracket is a subtraction: "10-3" ends with 3, not with -3.
_NUMBER = re.compile(r"(?:(?<![\w)\]])-)?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?")
_THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_CHOICE = re.compile(r"(answer|option|solution|ending)\s?([1-9])(?!\d)", re.IGNORECASE)
_LETTER_PATTERNS = (  # the first that matches decides, by its last match
    re.compile(r"(?i:answer|option|choice)(?i:\s+is)?\s*:?\s*\(?([A-E])\b"),
    re.compile(r"\(([A-E])\)"),
    re.compile(r"\b([A-E])\b(?!\s+[a-z])"),  # not the article of "A car ..."
)


@dataclass(frozen=True)
class EvaluationItem:
    """Hold one question: ``row`` is input for :func:`smt_dist.data.prompts.format_prompt`."""

    row: dict[str, Any]
    answer: str
    kind: AnswerKind


@dataclass(frozen=True)
class Prediction:
    """Hold the model's answer to one item; ``parsed`` is None if it has no answer of that kind."""

    instruction: str
    answer: str
    generation: str
    parsed: str | None
    correct: bool


@dataclass(frozen=True)
class EvaluationResult:
    """Hold the scores over ``n`` items; ``accuracy`` is 0 to 1, and unparsed items are wrong."""

    prompt_style: PromptStyle
    accuracy: float
    n: int
    correct: int
    unparsed: int
    predictions: list[Prediction]

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain lists and dicts, ready for JSON."""
        return asdict(self)


def infer_answer_kind(answer: str) -> AnswerKind | None:
    """Return the kind of a reference answer; None if unknown.

    Kinds are true/false, answerN (or optionN, solutionN, endingN), a letter A-E and a number.
    """
    if answer in ("true", "false"):
        return "boolean"
    if choice := re.fullmatch(r"(answer|option|solution|ending)[1-9]", answer):
        return choice[1]
    if re.fullmatch(r"[A-E]", answer):
        return "letter"
    if _NUMBER.fullmatch(_plain_number_text(answer).strip().removesuffix("%")):
        return "number"
    return None


def parse_prediction(text: str, kind: AnswerKind) -> str | None:
    """Find the answer of this kind in a generation, in the form of reference answers.

    As in LLM-Adapters, the *last* number counts, and the *first* true/false, answerN, optionN, solutionN or endingN.
    A letter is looked for after "answer is", then in parentheses, then on its own.

    Returns:
        The answer, or None if there is none.
    """
    if kind == "number":
        numbers = _NUMBER.findall(_plain_number_text(text))
        return numbers[-1] if numbers else None
    if kind == "boolean":
        found = re.search(r"\b(true|false)\b", text, re.IGNORECASE)
        return found[1].lower() if found else None
    if kind == "letter":
        return next((letters[-1] for p in _LETTER_PATTERNS if (letters := p.findall(text))), None)
    found = next((m for m in _CHOICE.finditer(text) if m[1].lower() == kind), None)
    return kind + found[2] if found else None


def is_correct(parsed: str | None, answer: str, kind: AnswerKind) -> bool:
    """Return whether a prediction equals the reference, numbers within :data:`NUMBER_TOLERANCE`."""
    if parsed is None:
        return False
    if kind != "number":
        return parsed == answer
    reference = parse_prediction(answer, kind)
    return math.isclose(float(parsed), float(reference or "nan"), rel_tol=0, abs_tol=NUMBER_TOLERANCE)


def make_items(rows: Rows, max_items: int | None = None) -> list[EvaluationItem]:
    """Check the rows and make the first ``max_items`` of them into items.

    Args:
        rows: with ``instruction``, optional ``input``, and ``answer``.
        max_items: None: all rows.

    Raises:
        SMTError: a field is missing or mistyped, or an answer is of no known kind; names the first such row.
    """
    items = []
    for index in range(len(rows) if max_items is None else min(max_items, len(rows))):
        rows.require_text(index, "instruction")
        rows.require_text(index, "input", optional=True)
        answer = _answer_text(rows, index)
        kind = infer_answer_kind(answer)
        if kind is None:
            raise rows.error(
                index,
                f"field 'answer' must be true/false, answerN/optionN/solutionN/endingN, a number or a letter "
                f"A-E, not {answer[:40]!r}",
            )
        items.append(EvaluationItem(rows[index], answer, kind))
    return items


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    show_progress: bool = False,
    description: str = "Generating",
) -> list[str]:
    """Generate greedy continuations of token-id prompts.

    Prompts run in batches of similar length, padded on the left. The longest come first, so that a lack of memory
    shows at once. A sequence ends at the tokenizer's EOS, at the model's own end tokens, or after ``max_new_tokens``.

    Returns:
        The texts without special tokens, in the order of ``prompts``.

    Raises:
        SMTError: a prompt and ``max_new_tokens`` don't fit in the model's positions.
    """
    _check_lengths(model, prompts, max_new_tokens)
    settings = _greedy_settings(model, tokenizer, max_new_tokens)
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    texts = [""] * len(prompts)
    bar = tqdm(total=len(prompts), desc=description, unit="item", disable=not show_progress)
    with bar, _evaluation_mode(model), torch.inference_mode():
        for begin in range(0, len(order), batch_size):
            chosen = order[begin : begin + batch_size]
            batch = _pad_left([prompts[index] for index in chosen], settings.pad_token_id, model.device)
            output = model.generate(**batch, generation_config=settings)
            new_tokens = output[:, batch["input_ids"].shape[1] :]
            decoded = tokenizer.batch_decode(new_tokens, skip_special_tokens=True)
            for index, text in zip(chosen, decoded, strict=True):
                texts[index] = text
            bar.update(len(chosen))
    return texts


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: list[EvaluationItem],
    *,
    prompt_style: PromptStyle = "plain",
    batch_size: int = 32,
    max_new_tokens: int = 64,
    show_progress: bool = False,
) -> EvaluationResult:
    """Answer every item and score the answers.

    Raises:
        SMTError: there are no items, the style is "chat" without a chat template, or an item is too long for the model.
    """
    if not items:
        raise SMTError("there are no items to evaluate")
    prompts = [
        encode_prompt(format_prompt(item.row, tokenizer, prompt_style), tokenizer, prompt_style) for item in items
    ]
    texts = generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        show_progress=show_progress,
        description=f"Answering ({prompt_style} prompt)",
    )
    predictions = [_score(item, text) for item, text in zip(items, texts, strict=True)]
    correct = sum(prediction.correct for prediction in predictions)
    return EvaluationResult(
        prompt_style=prompt_style,
        accuracy=correct / len(items),
        n=len(items),
        correct=correct,
        unparsed=sum(prediction.parsed is None for prediction in predictions),
        predictions=predictions,
    )


def _score(item: EvaluationItem, generation: str) -> Prediction:
    parsed = parse_prediction(generation, item.kind)
    correct = is_correct(parsed, item.answer, item.kind)
    return Prediction(item.row["instruction"], item.answer, generation, parsed, correct)


def _plain_number_text(text: str) -> str:
    return _THOUSANDS_COMMA.sub("", text).replace("$", "").replace("\u2212", "-")


def _answer_text(rows: Rows, index: int) -> str:
    answer = rows[index].get("answer")
    if isinstance(answer, bool):
        return str(answer).lower()
    if isinstance(answer, (int, float)):
        return str(answer)
    return rows.require_text(index, "answer").strip()


def _check_lengths(model: PreTrainedModel, prompts: list[list[int]], max_new_tokens: int) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max(range(len(prompts)), key=lambda index: len(prompts[index]))
    if limit and len(prompts[longest]) + max_new_tokens > limit:
        raise SMTError(
            f"item {longest + 1} has {len(prompts[longest])} prompt tokens; with max_new_tokens "
            f"{max_new_tokens} that exceeds the model's {limit} positions"
        )


def _greedy_settings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> GenerationConfig:
    # The model's own generation_config can sample or penalise repetition; scores need the plain argmax.
    own_ends = model.generation_config.eos_token_id if model.generation_config else None
    own_ends = own_ends if isinstance(own_ends, list) else [own_ends] if own_ends is not None else []
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        max_new_tokens=max_new_tokens,
        pad_token_id=get_pad_token_id(tokenizer),
        eos_token_id=sorted({require_eos_token(tokenizer), *own_ends}),
        use_cache=True,
    )


def _pad_left(prompts: list[list[int]], pad_token_id: int, device: torch.device) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    ids = [[pad_token_id] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


@contextmanager
def _evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
