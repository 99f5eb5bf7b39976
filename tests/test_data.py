"""Rows become the right tokens and labels, bad rows are named, and packing changes no loss."""

from __future__ import annotations

import json

import pytest
import torch
from architectures import ARCHITECTURES, make_model
from tiny_tokenizer import CHAT_TEMPLATE, GENERATION_CHAT_TEMPLATE, make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from smt_dist.data.dataset import CausalLMCollator, build_dataset, get_pad_token_id, load_rows, pack_lengths
from smt_dist.data.prompts import encode_prompt, format_prompt
from smt_dist.data.rows import Rows, check_rows, read_rows
from smt_dist.errors import SMTError
from smt_dist.models.packing import PACKING_ARCHITECTURES, prepare_model_for_packing

INSTRUCTION = {"instruction": "2 + 2?", "input": "", "output": "It is 4"}
MESSAGES = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
    ]
}
# Renders an assistant turn differently when it isn't the last, as templates that drop reasoning do.
FORGETFUL_TEMPLATE = CHAT_TEMPLATE.replace(
    "+ '\n' + message",
    "+ '\n' + ('<think>' if loop.last and message['role'] == 'assistant' else '') + message",
)


def make_rows(*rows: dict) -> Rows:
    return Rows(list(rows), "rows.json", range(1, len(rows) + 1), "row")


def build(*rows: dict, tokenizer=None, max_seq_length: int = 512, **options):
    return build_dataset(make_rows(*rows), tokenizer or make_tokenizer(), max_seq_length=max_seq_length, **options)


def trained_text(example: dict, tokenizer) -> str:
    """The tokens with a label, decoded; untrained stretches between them become "|"."""
    pieces, learning = [], False
    for label in example["labels"]:
        if label != -100:
            pieces.append(("" if learning or not pieces else "|") + tokenizer.decode([label]))
        learning = label != -100
    return "".join(pieces)


@pytest.mark.parametrize("prompt_style", ["plain", "chat"])
@pytest.mark.parametrize("add_bos", [False, True])
def test_training_prompt_is_the_generation_prompt(prompt_style, add_bos):
    """Otherwise the model is evaluated on prompts that it wasn't trained on."""
    tokenizer = make_tokenizer(add_bos=add_bos)
    row = {"instruction": "Add.", "input": "2 and 2", "output": "4"}
    dataset, _ = build(row, tokenizer=tokenizer, prompt_style=prompt_style)
    prompt = encode_prompt(format_prompt(row, tokenizer, prompt_style), tokenizer, prompt_style)
    example = dataset[0]
    assert example["input_ids"][: len(prompt)] == prompt
    assert example["labels"][: len(prompt)] == [-100] * len(prompt)
    assert example["input_ids"].count(tokenizer.bos_token_id) == (add_bos and prompt_style == "plain")
    assert trained_text(example, tokenizer) == "4<eos>"


def test_plain_prompt_is_alpacas():
    """Published Alpaca and LLM-Adapters figures are for this template."""
    tokenizer = make_tokenizer()
    with_input = format_prompt({"instruction": "Add {x}.", "input": "2"}, tokenizer, "plain")
    assert with_input.endswith("### Instruction:\nAdd {x}.\n\n### Input:\n2\n\n### Response:\n")
    assert "### Input:" not in format_prompt({"instruction": "Add.", "input": None}, tokenizer, "plain")


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, GENERATION_CHAT_TEMPLATE, FORGETFUL_TEMPLATE])
def test_only_assistant_turns_are_trained(template):
    """A label on a user's words teaches the model to ask; a missing EOS label, never to stop."""
    tokenizer = make_tokenizer(chat_template=template)
    dataset, _ = build(MESSAGES, tokenizer=tokenizer)
    text = tokenizer.apply_chat_template(MESSAGES["messages"], tokenize=False)
    assert tokenizer.decode(dataset[0]["input_ids"]) == text
    last = "<think>2" if template == FORGETFUL_TEMPLATE else "2"
    assert trained_text(dataset[0], tokenizer) == f"Hello<eos>|{last}<eos>"


def test_users_echo_is_not_trained():
    """Without a generation prompt a turn is found by its content, which the user may have said before."""
    template = CHAT_TEMPLATE.split("{% if add_generation_prompt %}")[0]
    tokenizer = make_tokenizer(chat_template=template)
    echo = [{"role": role, "content": "yes"} for role in ("user", "assistant", "user", "assistant")]
    dataset, _ = build({"messages": echo}, tokenizer=tokenizer)
    assert trained_text(dataset[0], tokenizer) == "yes<eos>|yes<eos>"
    position = dataset[0]["labels"].index(tokenizer.eos_token_id)
    assert tokenizer.decode(dataset[0]["input_ids"][: position + 1]).endswith("assistant\nyes<eos>")


def test_conversation_whose_turns_cannot_be_told_is_refused():
    """A template that writes the turns in another order would have the user's words trained."""
    template = "{% for m in messages | reverse %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    with pytest.raises(SMTError, match="row 1: the chat template's output doesn't show where message 3 begins"):
        build(MESSAGES, tokenizer=make_tokenizer(chat_template=template))


def test_text_is_trained_whole():
    """The first token is the exception: nothing predicts it, and it must not count as a trained token."""
    tokenizer = make_tokenizer(add_bos=True)
    dataset, report = build({"text": "Once upon"}, tokenizer=tokenizer)
    assert trained_text(dataset[0], tokenizer) == "Once upon<eos>"
    assert dataset[0]["labels"][0] == -100
    assert report.trained_tokens == report.tokens - 1


def test_truncation_is_counted_and_answerless_rows_are_dropped():
    """Silent truncation trains on half answers, or on none, without anybody knowing."""
    tokenizer = make_tokenizer()
    prompt = len(format_prompt(INSTRUCTION, tokenizer, "plain"))
    long_prompt = {**INSTRUCTION, "instruction": "x" * 300}
    dataset, report = build(INSTRUCTION, long_prompt, {**INSTRUCTION, "output": "4"}, max_seq_length=prompt + 3)
    assert (report.rows, report.truncated, report.dropped, report.sequences) == (3, 2, 1, 2)
    assert [trained_text(example, tokenizer) for example in dataset] == ["It ", "4<eos>"]
    assert report.trained_tokens == 5
    assert "2 rows (66.7%) truncated" in report.summary(prompt + 3)


def test_json_and_jsonl_give_the_same_rows(tmp_path):
    """Both occur under either name; a line separator inside a string is no row border."""
    rows = [{"text": "a\u2028b"}, {"text": "c"}]
    (tmp_path / "list.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    for name in ("lines.jsonl", "lines.json"):
        (tmp_path / name).write_text(lines, encoding="utf-8")
        assert list(read_rows(tmp_path / name)) == rows
    assert list(load_rows(tmp_path / "list.json")) == rows
    assert read_rows(tmp_path / "lines.jsonl").numbers == [1, 3]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b" \n", "a.json: the file is empty"),
        ("a.json", b"[]", "a.json: the list has no rows"),
        ("a.json", b"[{]", "a.json: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": ', "a.jsonl, line 3: not JSON"),
        ("a.json", b'[{"text": "x"}, 3]', "a.json, row 2: must be a JSON object, not int"),
        ("a.json", b"\xff\xfe", "a.json: isn't UTF-8"),
        ("a.json", b"[" * 100_000, "a.json: not JSON"),
    ],
)
def test_bad_file_is_named(tmp_path, name, content, message):
    """The user needs the file and the row, not a traceback."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SMTError) as caught:
        read_rows(tmp_path / name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder_are_named(tmp_path):
    """Both are common slips of the command line."""
    with pytest.raises(SMTError, match=r"nothing\.json: no such file"):
        read_rows(tmp_path / "nothing.json")
    with pytest.raises(SMTError, match="can't be read"):
        read_rows(tmp_path)
    with pytest.raises(SMTError, match="either a data file or a data set"):
        load_rows("a.json", "hub/name")


@pytest.mark.parametrize(
    ("bad_row", "message"),
    [
        ({"question": "x"}, "row 2: has no field that says its format"),
        ({"instruction": "x"}, "row 2: field 'output' is missing"),
        ({"instruction": "x", "output": 5}, "row 2: field 'output' must be a string, not int"),
        ({"instruction": "x", "input": [], "output": ""}, "row 2: field 'input' must be a string, not list"),
        ({"text": "x"}, "row 2: is a 'text' row, but the rows before it are 'instruction' rows"),
        ({**INSTRUCTION, **MESSAGES}, "row 2: has 'instruction' and 'messages'"),
    ],
)
def test_bad_row_is_named(bad_row, message):
    """One wrong row in a million must be found from the message alone."""
    with pytest.raises(SMTError, match=message):
        check_rows(make_rows(INSTRUCTION, bad_row))


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "row 1: field 'messages' must be a list"),
        ([], "row 1: field 'messages' must be a list"),
        (["hello"], "row 1: message 1 must be an object"),
        ([{"role": "user", "content": None}], "row 1: message 1: field 'content' is missing or not a string"),
    ],
)
def test_bad_message_is_named(messages, message):
    """Chat rows nest, so the message number is part of the place."""
    with pytest.raises(SMTError, match=message):
        check_rows(make_rows({"messages": messages}))


def test_data_without_any_label_is_refused():
    """Training on it would give a loss of NaN or 0."""
    with pytest.raises(SMTError, match=r"rows\.json: no row has a label to train"):
        build({"messages": MESSAGES["messages"][:2]})


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('no system') }}", "row 1: .*rejects these messages: no system"),
    ],
)
def test_unusable_chat_template_is_an_input_error(template, message):
    """Base models have no template, and some templates refuse some conversations."""
    with pytest.raises(SMTError, match=message):
        build(MESSAGES, tokenizer=make_tokenizer(chat_template=template))


def test_pad_token_falls_back_to_eos():
    """Adding a token would resize the embeddings of the frozen base."""
    assert get_pad_token_id(make_tokenizer()) == 0
    assert get_pad_token_id(make_tokenizer(has_pad=False)) == make_tokenizer().eos_token_id


def test_collator_pads_every_column():
    """Padding must neither be attended to nor trained."""
    examples = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1, 1, 1]},
        {"input_ids": [8], "labels": [8], "attention_mask": [1]},
    ]
    batch = CausalLMCollator(pad_token_id=2, pad_to_multiple_of=4)(examples)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 2], [8, 2, 2, 2]]
    assert batch["labels"].tolist() == [[-100, 6, 7, -100], [8, -100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]


def test_packing_keeps_every_example_once_and_fits():
    """A lost example is lost data; an overfull sequence runs out of memory or of positions."""
    lengths = torch.randint(1, 33, (500,), generator=torch.Generator().manual_seed(0)).tolist()
    bins = pack_lengths(lengths, 32, open_bins=8)
    assert sorted(index for members in bins for index in members) == list(range(500))
    assert all(sum(lengths[index] for index in members) <= 32 for members in bins)
    assert len(bins) < 1.15 * sum(lengths) / 32


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_loss_is_the_unpacked_loss(attention):
    """If packed examples saw one another, or the padding, the loss would differ."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, attn_implementation=attention,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    prepare_model_for_packing(model, batch_size=3)
    rows = [{"text": "the quick brown fox jumps over it"[:length]} for length in (33, 9, 14, 5, 20, 8)]
    plain, _ = build(*rows, max_seq_length=40)
    packed, report = build(*rows, max_seq_length=40, packing=True)
    assert report.sequences == len(packed) == 3
    assert "attention_mask" not in packed.column_names

    def summed_loss(examples) -> float:
        batch = CausalLMCollator(get_pad_token_id(tokenizer), pad_to_multiple_of=8)(list(examples))
        return model(**batch, num_items_in_batch=1).loss.item()

    one_by_one = sum(summed_loss([example]) for example in plain)
    assert summed_loss(packed) == pytest.approx(one_by_one, rel=1e-5)
    assert summed_loss(plain) == pytest.approx(one_by_one, rel=1e-5)


def test_packing_refuses_attention_that_would_mix_examples():
    """Flash attention finds the borders of packed examples only in a batch of one row."""
    model = LlamaForCausalLM(LlamaConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, vocab_size=9))
    model.config._attn_implementation = "flash_attention_2"
    prepare_model_for_packing(model, batch_size=1)
    with pytest.raises(SMTError, match="batch size of 1, not 2"):
        prepare_model_for_packing(model, batch_size=2)


KEEPS_APART = [name for name in ARCHITECTURES if name in PACKING_ARCHITECTURES]


@pytest.mark.parametrize("architecture", KEEPS_APART)
def test_packed_examples_do_not_see_one_another(architecture):
    """Failure: the architecture is allowed to pack, and trains on answers that leak from the row before."""
    assert len(KEEPS_APART) >= 8
    model = make_model(architecture)
    prepare_model_for_packing(model, batch_size=2)
    ids = torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, :5] = (changed[:, :5] + 7) % 60
    positions = torch.tensor([[*range(5), *range(7)]] * 2)
    with torch.no_grad():
        before, after = (model(input_ids=x, position_ids=positions).logits for x in (ids, changed))
    assert not torch.equal(before[:, :5], after[:, :5])
    torch.testing.assert_close(after[:, 5:], before[:, 5:], rtol=0, atol=1e-6)


@pytest.mark.parametrize("architecture", ["falcon", "bloom", "opt"])
def test_architectures_that_mix_packed_examples_are_refused(architecture):
    """These ignore position_ids in their attention mask, without a word."""
    with pytest.raises(SMTError, match=f"--packing: {architecture}"):
        prepare_model_for_packing(make_model(architecture), batch_size=1)
