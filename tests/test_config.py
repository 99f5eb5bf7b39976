"""A config is what its file says or it is refused: never a guess, never a traceback."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smt_dist.config import GroupConfig, SMTConfig
from smt_dist.errors import SMTError

DOCUMENTED_DEFAULTS = {
    "block_size": 256,
    "groups": [{"name": "attention", "target_modules": "attention", "fraction": 0.0084, "lr_multiplier": 1.0}],
    "selection": {"score": "abs_mean", "strategy": "even", "seed": 0},
    "warmup": {"steps": 100, "mode": "probe"},
}


def group(**values) -> dict:
    return {"groups": [values]}


# Config, and the place in it that the message must name.
WRONG = [
    ([], "top level"),
    ("text", "top level"),
    (None, "top level"),
    ({"blok_size": 64}, "blok_size"),
    ({"block_size": 0}, "block_size"),
    ({"block_size": -64}, "block_size"),
    ({"block_size": True}, "block_size"),
    ({"block_size": 64.0}, "block_size"),
    ({"block_size": "64"}, "block_size"),
    ({"block_size": "Auto"}, "block_size"),
    ({"block_size": None}, "block_size"),
    ({"block_size": []}, "block_size"),
    ({"block_size": [64]}, "block_size"),
    ({"block_size": [64, 64, 64]}, "block_size"),
    ({"block_size": [64, 0]}, "block_size"),
    ({"block_size": [64, "64"]}, "block_size"),
    ({"block_size": {"rows": 64}}, "block_size"),
    ({"block_size": 10**9}, "block_size"),
    ({"groups": []}, "groups"),
    ({"groups": {}}, "groups"),
    ({"groups": ["attention"]}, "groups.0"),
    ({"groups": [{"name": "a", "blocks": 1}, {"name": "a", "blocks": 1}]}, "groups"),
    (group(nme="a"), "groups.0.nme"),
    (group(name=""), "groups.0.name"),
    (group(name=3), "groups.0.name"),
    (group(target_modules=""), "groups.0.target_modules"),
    (group(target_modules=[]), "groups.0.target_modules"),
    (group(target_modules=["q_proj", ""]), "groups.0.target_modules"),
    (group(target_modules=["q_proj", 3]), "groups.0.target_modules"),
    (group(target_modules=3), "groups.0.target_modules"),
    (group(fraction=0), "groups.0.fraction"),
    (group(fraction=-0.1), "groups.0.fraction"),
    (group(fraction=1.1), "groups.0.fraction"),
    (group(fraction="0.01"), "groups.0.fraction"),
    (group(fraction=True), "groups.0.fraction"),
    (group(fraction=float("nan")), "groups.0.fraction"),
    (group(fraction=float("inf")), "groups.0.fraction"),
    (group(blocks=0), "groups.0.blocks"),
    (group(blocks=1.0), "groups.0.blocks"),
    (group(blocks="3"), "groups.0.blocks"),
    (group(blocks=True), "groups.0.blocks"),
    (group(blocks=3, fraction=0.1), "groups.0"),
    (group(lr_multiplier=0), "groups.0.lr_multiplier"),
    (group(lr_multiplier=-1), "groups.0.lr_multiplier"),
    (group(lr_multiplier="2"), "groups.0.lr_multiplier"),
    (group(lr_multiplier=True), "groups.0.lr_multiplier"),
    (group(lr_multiplier=None), "groups.0.lr_multiplier"),
    (group(lr_multiplier=float("inf")), "groups.0.lr_multiplier"),
    (group(lr_multiplier=float("nan")), "groups.0.lr_multiplier"),
    ({"selection": 3}, "selection"),
    ({"selection": {"scor": "l1"}}, "selection.scor"),
    ({"selection": {"score": "L1"}}, "selection.score"),
    ({"selection": {"score": 1}}, "selection.score"),
    ({"selection": {"strategy": "best"}}, "selection.strategy"),
    ({"selection": {"seed": -1}}, "selection.seed"),
    ({"selection": {"seed": "0"}}, "selection.seed"),
    ({"selection": {"seed": 1.0}}, "selection.seed"),
    ({"selection": {"seed": False}}, "selection.seed"),
    ({"selection": {"seed": 2**64}}, "selection.seed"),
    ({"warmup": []}, "warmup"),
    ({"warmup": {"step": 1}}, "warmup.step"),
    ({"warmup": {"steps": 0}}, "warmup.steps"),
    ({"warmup": {"steps": 1.5}}, "warmup.steps"),
    ({"warmup": {"steps": "100"}}, "warmup.steps"),
    ({"warmup": {"mode": "full"}}, "warmup.mode"),
    ({"warmup": {"passes": 0}}, "warmup.passes"),
    ({"warmup": {"passes": True}}, "warmup.passes"),
    ({"warmup": {"mode": "full_ft", "passes": 2}}, "warmup"),
    ({"untie": "yes"}, "untie"),
    ({"untie": 1}, "untie"),
    ({"bad_numbers": {"policy": "ignore"}}, "bad_numbers.policy"),
    ({"bad_numbers": {"policy": "skip", "limit": 0}}, "bad_numbers.limit"),
    ({"bad\nkey": 1}, "bad"),
    ({"warmup": {"mode": "a\nb"}}, "warmup.mode"),
    ({"warmup": {"mode": "x" * 5000}}, "warmup.mode"),
]


def assert_one_short_line(message: str) -> None:
    assert len(message.splitlines()) == 1
    assert len(message) < 500


def test_the_defaults_are_the_documented_ones():
    """Otherwise an omitted key means something else than the documentation says."""
    shown = json.loads(SMTConfig().to_json())
    selection = {**DOCUMENTED_DEFAULTS["selection"], "budget": "separate", "bounds_per": "layer"}
    warmup = {**DOCUMENTED_DEFAULTS["warmup"], "passes": 1}
    documented = {**DOCUMENTED_DEFAULTS, "selection": selection, "warmup": warmup, "form": "auto", "untie": False}
    documented["bad_numbers"] = {"policy": "stop", "limit": 3}
    assert shown == documented
    assert SMTConfig.from_json(json.dumps(DOCUMENTED_DEFAULTS)) == SMTConfig() == SMTConfig.from_json("{}")


@pytest.mark.parametrize(("content", "field"), WRONG, ids=lambda value: json.dumps(value)[:60])
def test_a_wrong_value_is_refused_in_one_line_that_names_the_field(tmp_path, content, field):
    """A value that is guessed at or ignored makes another run than the user asked for."""
    path = tmp_path / "smt.json"
    path.write_text(json.dumps(content))
    with pytest.raises(SMTError) as caught:
        SMTConfig.from_json_file(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: {field}")
    assert_one_short_line(message.replace(str(tmp_path), ""))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"{'block_size': 64}", "not valid JSON"),
        (b'{"block_size": 64,}', "not valid JSON"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"block_size": ' + b"9" * 10_000 + b"}", "not valid JSON"),
    ],
    ids=["empty", "cut", "python", "comma", "binary", "deep", "huge number"],
)
def test_a_file_that_is_no_json_is_refused_by_its_name(tmp_path, content, problem):
    """A parser's own traceback doesn't say which file is broken."""
    path = tmp_path / "smt.json"
    path.write_bytes(content)
    with pytest.raises(SMTError, match=problem) as caught:
        SMTConfig.from_json_file(path)
    assert str(caught.value).startswith(str(path))
    assert_one_short_line(str(caught.value).replace(str(tmp_path), ""))


@pytest.mark.parametrize("name", ["absent.json", "."], ids=["missing", "folder"])
def test_a_file_that_cannot_be_read_is_refused_by_its_name(tmp_path, name):
    """The commonest mistake of all is a wrong path."""
    with pytest.raises(SMTError) as caught:
        SMTConfig.from_json_file(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))


def test_a_key_given_twice_is_refused():
    """JSON readers take the last one silently: half of what the user wrote would be ignored."""
    with pytest.raises(SMTError, match="block_size"):
        SMTConfig.from_json('{"block_size": 64, "block_size": 128}')


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
anything = st.recursive(
    scalars | st.sampled_from(["auto", "attention", "mlp", "l1", "norm_dist", "full_ft"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def section(*keys: str):
    return anything | st.dictionaries(st.sampled_from(keys), anything, max_size=len(keys))


near_configs = st.fixed_dictionaries(
    {},
    optional={
        "block_size": anything,
        "groups": st.lists(section("name", "target_modules", "fraction", "blocks", "lr_multiplier"), max_size=3),
        "selection": section("score", "strategy", "seed"),
        "warmup": section("steps", "mode", "passes"),
        "untie": anything,
    },
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(anything | near_configs)
def test_any_json_is_a_config_or_a_clear_refusal(content):
    """Anything else is a traceback in a user's face; and what is accepted must survive being saved."""
    try:
        config = SMTConfig.from_json(json.dumps(content))
    except SMTError as error:
        assert_one_short_line(str(error))
    else:
        assert SMTConfig.from_json(config.to_json()) == config


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.text(max_size=40))
def test_any_text_is_a_config_or_a_clear_refusal(text):
    """As above, for files that aren't JSON at all."""
    try:
        SMTConfig.from_json(text)
    except SMTError as error:
        assert_one_short_line(str(error))


@pytest.mark.parametrize(
    "content",
    [
        {"block_size": "auto"},
        {"block_size": [32, 64], "untie": True},
        {"groups": [{"name": "a", "target_modules": ["q_proj"], "blocks": 3}, {"name": "b", "target_modules": "mlp"}]},
        {"groups": [{"target_modules": r".*\.(q|v)_proj", "fraction": 0.5, "lr_multiplier": 0.25}]},
        {"selection": {"score": "mean_abs_per_step", "strategy": "norm_dist", "seed": 7}},
        {"warmup": {"steps": 3, "mode": "full_ft"}},
    ],
    ids=json.dumps,
)
def test_a_config_survives_writing_and_reading(content):
    """Adapters carry their config: a value lost on the way would change a continued run."""
    config = SMTConfig.model_validate(content)
    again = SMTConfig.from_json(config.to_json())
    assert again == config
    assert again.to_json() == config.to_json()


@pytest.mark.parametrize(
    ("fraction", "parameters", "block", "count"),
    [(0.5, 1000, 100, 5), (0.599, 1000, 100, 5), (0.3, 1000, 100, 3), (0.7, 100, 10, 7), (1.0, 1050, 100, 10)],
)
def test_a_fraction_buys_whole_blocks_rounded_down(fraction, parameters, block, count):
    """More than the budget would break comparisons at an equal number of trained parameters."""
    assert GroupConfig(fraction=fraction).budget(parameters, block) == count


def test_a_number_of_blocks_is_taken_as_it_is():
    """ "blocks" exists to say the number exactly."""
    assert GroupConfig(blocks=890).budget(parameters_2d=10, block_elements=10) == 890


def test_a_fraction_smaller_than_one_block_is_refused_with_one_that_works():
    """Training nothing, silently, is the worst outcome; and the advice must be right."""
    with pytest.raises(SMTError, match=r"groups\[small\].fraction: 0.001 .* use at least 0.01") as caught:
        GroupConfig(name="small", fraction=0.001).budget(10_000, 128)
    advised = float(str(caught.value).rpartition(" ")[2])
    assert GroupConfig(fraction=advised).budget(10_000, 128) == 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 10**6), st.integers(1, 10**9))
def test_the_advised_fraction_always_buys_one_block(block, parameters):
    """Advice that fails when followed is worse than none."""
    if block > parameters:
        return
    tiny = GroupConfig(fraction=block / parameters / 2)
    with pytest.raises(SMTError) as caught:
        tiny.budget(parameters, block)
    advised = float(str(caught.value).rpartition(" ")[2])
    assert GroupConfig(fraction=min(advised, 1.0)).budget(parameters, block) >= 1


@pytest.mark.parametrize(
    ("one", "other", "found"),
    [
        ({}, {}, None),
        ({}, {"selection": {"strategy": "no_restriction"}}, 'selection.strategy is "even", was "no_restriction"'),
        (group(blocks=3), group(blocks=4), "groups[0].blocks is 3, was 4"),
        ({"groups": [{}, {"name": "b"}]}, {}, 'groups[1].name is "b", was null'),
        ({}, {"reselect": {"every": 5, "fraction": 0.5}}, "reselect.every is null, was 5"),
    ],
)
def test_the_first_difference_between_two_configs_is_named(one, other, found):
    """A file of 40 lines that "isn't the one" leaves the user to compare them; a default may have changed besides."""
    configs = [SMTConfig.model_validate(content) for content in (one, other)]
    assert configs[0].first_difference(configs[1]) == found
