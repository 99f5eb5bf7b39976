"""Answers are read out of generations as LLM-Adapters reads them, and batching changes no answer."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiers import slow
from tiny_tokenizer import make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from smt_dist import evaluation
from smt_dist.data.prompts import encode_prompt, format_prompt
from smt_dist.data.rows import Rows
from smt_dist.errors import SMTError
from smt_dist.evaluation import evaluate, generate, infer_answer_kind, is_correct, make_items, parse_prediction

PROGRAM = Path(__file__).parents[1] / "launch" / "evaluate_model.py"
ROWS = [
    {"instruction": "How many?", "input": "", "answer": "4.0"},
    {"instruction": "Is it so, this much longer question?", "input": "", "answer": "true"},
    {"instruction": "Which?", "input": "Answer1: a Answer2: b", "answer": "answer2"},
]


def make_rows(*rows: dict) -> Rows:
    return Rows(list(rows), "test.json", range(1, len(rows) + 1), "row")


def make_model(**options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(make_tokenizer()), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.5, bos_token_id=1, eos_token_id=2,
        **options,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("true", "boolean"), ("false", "boolean"), ("answer5", "answer"), ("option1", "option"),
        ("solution2", "solution"), ("ending4", "ending"), ("E", "letter"), ("15.0", "number"), ("-3", "number"),
        ("0.6666666666666666", "number"), ("1,234", "number"), ("$5", "number"), ("12%", "number"),
        ("2.4e+06", "number"),
        ("F", None), ("", None), ("maybe", None), ("answer", None), ("3 apples", None),
    ],
)  # fmt: skip
def test_answer_kind_follows_from_the_answer(answer, kind):
    """The kind picks the parser: a wrong one scores a whole data set as wrong."""
    assert infer_answer_kind(answer) == kind


@pytest.mark.parametrize(
    ("text", "kind", "parsed"),
    [
        ("3 + 4 = 7. The answer is 7.", "number", "7"),
        ("It costs $1,234.50 in all", "number", "1234.50"),
        ("so 1,234,567", "number", "1234567"),
        ("between 3,4", "number", "4"),
        ("The rate is 12%.", "number", "12"),
        ("x = -5", "number", "-5"),
        ("a debt of -$5", "number", "-5"),
        ("10-3", "number", "3"),
        ("half is .5", "number", ".5"),
        ("about 2.4e6 people", "number", "2.4e6"),
        ("no idea", "number", None),
        ("The correct answer is True", "boolean", "true"),
        ("false, not true", "boolean", "false"),
        ("untrue", "boolean", None),
        ("the correct answer is answer2", "answer", "answer2"),
        ("Answer 3, not answer1", "answer", "answer3"),
        ("the correct answer is option2", "answer", None),
        ("option12", "option", None),
        ("solution1", "solution", "solution1"),
        ("ENDING4", "ending", "ending4"),
        ("Of (A) and (B): the answer is (D).", "letter", "D"),
        ("Answer: C", "letter", "C"),
        ("It can't be (A), so (B).", "letter", "B"),
        ("A car drives. E", "letter", "E"),
        ("A car drives.", "letter", None),
        ("", "letter", None),
    ],
)
def test_prediction_is_parsed(text, kind, parsed):
    """A parser that misses answers understates the model, one that guesses flatters it."""
    assert parse_prediction(text, kind) == parsed


@pytest.mark.parametrize(
    ("parsed", "answer", "kind", "correct"),
    [
        ("15", "15.0", "number", True),
        ("0.667", "0.6666666666666666", "number", True),
        ("0.67", "0.6666666666666666", "number", False),
        ("1234", "1,234", "number", True),
        ("2400000", "2.4e+06", "number", True),
        ("9" * 400, "1", "number", False),
        (None, "1", "number", False),
        ("answer1", "answer2", "answer", False),
        ("B", "B", "letter", True),
    ],
)
def test_numbers_compare_by_value_and_the_rest_by_letter(parsed, answer, kind, correct):
    """References are written "15.0", models write "15"."""
    assert is_correct(parsed, answer, kind) is correct


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"instruction": "x"}, r"test\.json, row 2: field 'answer' is missing"),
        ({"instruction": "x", "answer": "perhaps"}, "row 2: field 'answer' must be .* not 'perhaps'"),
        ({"instruction": "x", "answer": ["1"]}, "row 2: field 'answer' must be a string, not list"),
        ({"answer": "1"}, "row 2: field 'instruction' is missing"),
    ],
)
def test_bad_row_is_named(row, message):
    """Skipping a row without an answer would change what the accuracy is a share of."""
    with pytest.raises(SMTError, match=message):
        make_items(make_rows(ROWS[0], row))
    assert len(make_items(make_rows(ROWS[0], row), max_items=1)) == 1


def test_json_numbers_and_booleans_are_answers():
    """JSON writers don't all quote."""
    items = make_items(make_rows({"instruction": "x", "answer": 5}, {"instruction": "x", "answer": True}))
    assert [(item.answer, item.kind) for item in items] == [("5", "number"), ("true", "boolean")]


def test_batching_and_sorting_change_nothing():
    """Wrong left padding, positions or order would show as different answers in a batch than alone."""
    tokenizer, model = make_tokenizer(has_pad=False), make_model().train()
    prompts = [tokenizer(text)["input_ids"] for text in ("ab", "a much longer prompt", "c", "middling one")]
    batched = generate(model, tokenizer, prompts, max_new_tokens=8, batch_size=3)
    alone = [generate(model, tokenizer, [p], max_new_tokens=8, batch_size=1)[0] for p in prompts]
    assert batched == alone
    assert len(set(batched)) > 1
    assert model.training


def test_generation_is_greedy_and_stops_at_the_models_own_end():
    """A sampling default in the model's folder must not reach the scores; chat models end turns their own way."""
    tokenizer, model = make_tokenizer(), make_model()
    prompt = tokenizer("ab")["input_ids"]
    model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=9.0)
    first = generate(model, tokenizer, [prompt], max_new_tokens=8, batch_size=1)
    ids = list(prompt)
    with torch.inference_mode():
        for _ in range(8):
            ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    new = ids[len(prompt) :]
    assert first == [tokenizer.decode(new, skip_special_tokens=True)]
    model.generation_config.eos_token_id = [new[2]]
    stop = new.index(new[2]) + 1
    stopped = generate(model, tokenizer, [prompt], max_new_tokens=8, batch_size=1)
    assert stopped == [tokenizer.decode(new[:stop], skip_special_tokens=True)]


def test_scores_add_up(monkeypatch):
    """Unparsed answers are wrong answers, and predictions keep the order of the file."""
    monkeypatch.setattr(evaluation, "generate", lambda *_, **__: ["It is 4.", "dunno", "answer1"])
    result = evaluate(None, make_tokenizer(), make_items(make_rows(*ROWS)))
    assert (result.n, result.correct, result.unparsed) == (3, 1, 1)
    assert result.accuracy == pytest.approx(1 / 3)
    written = json.loads(json.dumps(result.to_dict()))
    assert [p["parsed"] for p in written["predictions"]] == ["4", None, "answer1"]
    assert [p["correct"] for p in written["predictions"]] == [True, False, False]


def test_evaluation_reads_the_training_prompt(monkeypatch):
    """Another prompt than the trained one costs accuracy without any sign."""
    tokenizer, seen = make_tokenizer(add_bos=True), []
    monkeypatch.setattr(evaluation, "generate", lambda _model, _tok, prompts, **_: seen.extend(prompts) or [""])
    evaluate(None, tokenizer, make_items(make_rows(ROWS[2])), prompt_style="chat")
    assert seen == [encode_prompt(format_prompt(ROWS[2], tokenizer, "chat"), tokenizer, "chat")]


def test_too_long_prompt_is_refused():
    """Beyond its positions a model babbles or crashes, which isn't its accuracy."""
    model, tokenizer = make_model(max_position_embeddings=16), make_tokenizer()
    with pytest.raises(SMTError, match="item 2 has 10 prompt tokens"):
        generate(model, tokenizer, [[5], [5] * 10], max_new_tokens=8, batch_size=1)


def run_program(folder: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(PROGRAM), "--model_name_or_path", str(folder), "--device", "cpu", *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=PROGRAM.parents[1])


def test_program_writes_both_styles_and_the_better(tmp_path):
    """The file is what experiments are read from."""
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    output = tmp_path / "new" / "folder" / "results.json"
    flags = ["--prompt_style", "best", "--max_new_tokens", "4", "--max_items", "2", "--output", str(output)]
    done = run_program(tmp_path / "model", "--eval_file", str(questions), *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    written = json.loads(output.read_text(encoding="utf-8"))
    assert [result["prompt_style"] for result in written["results"]] == ["plain", "chat"]
    assert [len(result["predictions"]) for result in written["results"]] == [2, 2]
    assert written["accuracy"] == max(result["accuracy"] for result in written["results"])
    assert [path.name for path in output.parent.iterdir()] == ["results.json"]


@pytest.mark.parametrize("bad", [pytest.param("eval_file", marks=slow), "model"])
def test_program_answers_bad_input_with_one_line(tmp_path, bad):
    """No traceback, exit code 2."""
    questions = tmp_path / "questions.json"
    questions.write_text(json.dumps(ROWS), encoding="utf-8")
    if bad == "eval_file":
        questions.unlink()
    make_tokenizer().save_pretrained(tmp_path)
    make_model().config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    done = run_program(tmp_path, "--eval_file", str(questions), "--output", str(tmp_path / "results.json"))
    assert done.returncode == 2
    expected = "questions.json: no such file" if bad == "eval_file" else f"{tmp_path / 'model.safetensors'}: damaged"
    assert expected in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
