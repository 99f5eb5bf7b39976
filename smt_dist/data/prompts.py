"""Turn prompts, chat turns and plain text into token ids and a mask of trained tokens.

Training and evaluation share :func:`format_prompt` and :func:`encode_prompt`, for equal tokens in both.
"""

from __future__ import annotations

import itertools
import re
from typing import Any, Literal

import jinja2
from transformers import PreTrainedTokenizerBase

from smt_dist.data.rows import Rows
from smt_dist.errors import SMTError

PromptStyle = Literal["plain", "chat"]
Encoded = tuple[list[int], list[bool]]  # token ids; whether each is trained

PLAIN_PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
PLAIN_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def format_prompt(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, prompt_style: PromptStyle) -> str:
    """Return the prompt of an ``instruction`` row, up to where the answer begins.

    Raises:
        SMTError: ``prompt_style`` is unknown, or "chat" while the tokenizer has no usable chat template.
    """
    context = row.get("input") or ""
    if prompt_style == "plain":
        template = PLAIN_PROMPT_WITH_INPUT if context else PLAIN_PROMPT
        return template.format(instruction=row["instruction"], input=context)
    if prompt_style != "chat":
        raise SMTError(f"prompt_style must be 'plain' or 'chat', not '{prompt_style}'")
    content = row["instruction"] + (f"\n{context}" if context else "")
    return _render_chat([{"role": "user", "content": content}], tokenizer, add_generation_prompt=True)


def encode_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase, prompt_style: PromptStyle) -> list[int]:
    """Tokenise a formatted prompt, with BOS if the tokenizer uses one, and without EOS."""
    # A chat template adds its own special tokens.
    return _encode(prompt, tokenizer, add_special_tokens=prompt_style == "plain")


def require_eos_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the end-of-sequence token.

    Raises:
        SMTError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise SMTError(f"tokenizer '{tokenizer.name_or_path}' has no end-of-sequence token, so answers couldn't end")
    return tokenizer.eos_token_id


def encode_instruction(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, prompt_style: PromptStyle) -> Encoded:
    """Encode an ``instruction`` row: the prompt isn't trained, the output and EOS are."""
    # Tokenised separately, because evaluation tokenises the prompt alone and must get the same tokens.
    prompt = encode_prompt(format_prompt(row, tokenizer, prompt_style), tokenizer, prompt_style)
    output = [*_encode(row["output"], tokenizer, add_special_tokens=False), require_eos_token(tokenizer)]
    return prompt + output, [False] * len(prompt) + [True] * len(output)


def encode_text(text: str, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Encode plain text and EOS; all tokens are trained."""
    ids = [*_encode(text, tokenizer, add_special_tokens=True), require_eos_token(tokenizer)]
    return ids, [True] * len(ids)


def encode_messages(rows: Rows, index: int, tokenizer: PreTrainedTokenizerBase) -> Encoded:
    """Encode a ``messages`` row by the chat template.

    The assistant's words and its ends of turn are trained.

    Raises:
        SMTError: the template rejects the messages, or the assistant's turns can't be found in its output; names the
            row.
    """
    messages = rows[index]["messages"]
    try:
        if re.search(r"\{%-?\s*generation\s*-?%\}", _get_chat_template(tokenizer)):
            marked = _apply_template(
                messages, tokenizer, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            return marked["input_ids"], [bool(trained) for trained in marked["assistant_masks"]]
        text, spans = _find_assistant_spans(messages, tokenizer)
    except SMTError as error:
        raise rows.error(index, str(error)) from error
    ids: list[int] = []
    trained: list[bool] = []
    borders = [0, *(border for span in spans for border in span), len(text)]
    for number, (start, end) in enumerate(itertools.pairwise(borders)):
        piece = _encode(text[start:end], tokenizer, add_special_tokens=False)
        ids += piece
        trained += [number % 2 == 1] * len(piece)
    return ids, trained


def _find_assistant_spans(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[tuple[int, int]]]:
    """Render the conversation and find the [start, end) characters of each assistant turn.

    Raises:
        SMTError: a turn's start or end isn't certain; a guess could train on the user's words.
    """
    text = _render_chat(messages, tokenizer)
    spans = []
    cursor = 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = _find_turn_start(text, messages[:number], message["content"].strip(), tokenizer)
        end = _find_turn_end(text, start, messages[: number + 1], tokenizer)
        if not cursor <= start < end:
            raise SMTError(f"the chat template's output doesn't show where message {number + 1} begins and ends")
        # Generation stops at EOS, so a line break that the template adds after it isn't trained.
        eos = tokenizer.eos_token
        last_eos = text.rfind(eos, start, end) if eos else -1
        cursor = end if last_eos < 0 else last_eos + len(eos)
        spans.append((start, cursor))
    return text, spans


def _find_turn_start(text: str, earlier: list[dict[str, str]], content: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return where the generation prompt ends, or ``content`` begins without one; -1 if unclear."""
    if not earlier:
        return text.find(content)
    prompted = _render_chat(earlier, tokenizer, add_generation_prompt=True)
    unprompted = _render_chat(earlier, tokenizer)
    if prompted != unprompted and text.startswith(prompted):
        return len(prompted)
    return text.find(content, len(unprompted)) if text.startswith(unprompted) else -1


def _find_turn_end(text: str, start: int, through: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> int:
    """Return where the conversation ``through`` this turn ends; -1 if unclear.

    A template can render a turn differently if others follow (without its reasoning, for example). Then the turn must
    be its content, at ``start``, and the text that follows the content when this turn is the last.
    """
    rendered = _render_chat(through, tokenizer)
    if text.startswith(rendered):
        return len(rendered)
    content = through[-1]["content"].strip()
    turn = content + rendered[rendered.rfind(content) + len(content) :]
    found = text.find(turn, max(start, 0))
    return found + len(turn) if found >= 0 and not text[start:found].strip() else -1


def _get_chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        return tokenizer.get_chat_template()
    except ValueError as error:
        raise SMTError(f"tokenizer '{tokenizer.name_or_path}' has no chat template") from error


def _render_chat(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool = False
) -> str:
    return _apply_template(messages, tokenizer, tokenize=False, add_generation_prompt=add_generation_prompt)


def _apply_template(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
    template = _get_chat_template(tokenizer)
    try:
        return tokenizer.apply_chat_template(messages, chat_template=template, **options)
    except jinja2.TemplateError as error:
        raise SMTError(f"the chat template rejects these messages: {' '.join(str(error).split())}") from error


def _encode(text: str, tokenizer: PreTrainedTokenizerBase, *, add_special_tokens: bool) -> list[int]:
    ids = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
    # Some tokenizers are configured to append EOS; the callers add it where it belongs.
    if add_special_tokens and ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return ids
