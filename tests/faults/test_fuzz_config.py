"""The config and the command line, with any value in any place: accepted, or refused in one line."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
from damage import outcome
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import CONFIG, command_line
from tiers import slow

from smt_dist import SMTConfig
from smt_dist.cli.program import parse_arguments
from smt_dist.training.arguments import SMTTrainingArguments
from smt_dist.training.run_arguments import RunArguments

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.sampled_from(
    ["auto", "attention", "mlp", "l1", "norm_dist", "full_ft", 8, [8, 8], 10**30, -1, "(a+)+$", "[", "\ud800"]
)  # fmt: skip
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def paths(content: Any, prefix: tuple = ()) -> Iterator[tuple]:
    """The place of every value."""
    yield prefix
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from paths(value, (*prefix, key))


WHOLE = {**CONFIG, "untie": False, "selection": {"score": "l1", "strategy": "norm_dist", "seed": 0}}
WHOLE["groups"] = [
    {**CONFIG["groups"][0], "lr_multiplier": 1.0},
    {"name": "b", "target_modules": "mlp", "fraction": 0.1},
]
WHOLE["warmup"] = {"steps": 2, "mode": "scoring", "passes": 1}
PLACES = list(paths(WHOLE))


def replaced(content: Any, place: tuple, value: Any) -> Any:
    if not place:
        return value
    copy = content.copy()
    copy[place[0]] = replaced(content[place[0]], place[1:], value)
    return copy


@pytest.mark.parametrize("examples", [300, pytest.param(1500, marks=slow)])
def test_config_with_any_value_anywhere_is_a_config_or_one_line(examples):
    """Each key with every kind of value; what is accepted survives being saved."""
    changes = st.lists(st.tuples(st.sampled_from(PLACES), anything), min_size=1, max_size=2)
    plan = settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    plan(given(changes)(read_changed))()


def read_changed(changes: list[tuple[tuple, Any]]) -> None:
    """Read the whole config with other values in some places."""
    content = WHOLE
    for place, value in changes:
        try:
            content = replaced(content, place, value)
        except (KeyError, TypeError, IndexError, AttributeError):  # the first change took that place away
            continue
    text = json.dumps(content)
    refusal = outcome(lambda: SMTConfig.from_json(text))
    if refusal is None:
        config = SMTConfig.from_json(text)
        assert SMTConfig.from_json(config.to_json()) == config
    else:
        assert len(refusal) < 500


FLAG_VALUES = ("", "nan", "-1", "1e999", "9" * 25, "0", "[]", "{", "true", "/nowhere/x", "\x1b[2J", "a\nb", "[" * 3000)


def test_any_value_of_any_flag_is_accepted_or_one_line(monkeypatch, tmp_path):
    """TrainingArguments alone has over a hundred; a traceback of its inside names none of them."""
    right = {"output_dir": tmp_path / "out", "model_name_or_path": "m", "train_file": "t"}
    names = [field.name for kind in (RunArguments, SMTTrainingArguments) for field in fields(kind) if field.init]
    counts: Counter[bool] = Counter()
    for index, name in enumerate(names):
        for value in (FLAG_VALUES[index % len(FLAG_VALUES)], FLAG_VALUES[(index + 5) % len(FLAG_VALUES)]):
            argv = ["train.py", *command_line({**right, name: value})]
            monkeypatch.setattr("sys.argv", argv)

            def parse() -> None:
                run, _ = parse_arguments(RunArguments, "")
                run.check()

            counts[outcome(parse) is None] += 1
    assert counts[False] > 50
    assert counts[True] > 50
