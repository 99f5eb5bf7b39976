"""Former names of config keys, values and flags mean what their current names mean, and are still what files hold."""

from __future__ import annotations

import json

import pytest

from smt_dist.cli.program import parse_arguments
from smt_dist.config import SMTConfig
from smt_dist.errors import SMTError
from smt_dist.training.run_arguments import RunArguments

# Former and current spelling of a config.
CONFIGS = [
    ({"bad_numbers": {"policy": "skip", "limit": 2}}, {"non_finite": {"policy": "skip", "limit": 2}}),
    ({"warmup": {"mode": "probe", "steps": 7}}, {"warmup": {"mode": "scoring", "steps": 7}}),
]
# Former and current spelling of a command line, and whether a report is written.
FLAGS = [
    (["--picture", "false"], ["--selection_report", "false"], False),
    (["--picture=no"], ["--selection_report=no"], False),
    (["--picture"], ["--selection_report"], True),
    (["--no_picture"], ["--no_selection_report"], False),
    (["--no-picture"], ["--no-selection-report"], False),
]


def run_arguments(monkeypatch: pytest.MonkeyPatch, *words: str) -> RunArguments:
    monkeypatch.setattr("sys.argv", ["smt-train", *words])
    return parse_arguments(RunArguments, None)[0]


@pytest.mark.parametrize(("former", "current"), CONFIGS, ids=str)
def test_a_config_of_either_spelling_is_the_same_and_is_written_as_before(former, current):
    """Adapters and checkpoints of all versions must be read by all versions."""
    old, new = (SMTConfig.from_json(json.dumps(content)) for content in (former, current))
    assert old == new
    assert old != SMTConfig()
    assert old.to_json() == new.to_json()
    written = json.loads(new.to_json())
    ((section, values),) = former.items()
    assert written[section] == written[section] | values
    assert SMTConfig.from_json(new.to_json()) == new


def test_a_config_with_both_names_is_refused():
    """Which of the two counts would be a guess."""
    content = {"bad_numbers": {"policy": "stop"}, "non_finite": {"policy": "skip"}}
    with pytest.raises(SMTError, match=r"'non_finite' and 'bad_numbers' are two names .* give one of them$") as caught:
        SMTConfig.from_json(json.dumps(content))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("former", "current", "is_wanted"), FLAGS, ids=str)
def test_a_flag_of_either_name_is_the_same(monkeypatch, former, current, is_wanted):
    """A script of yesterday must run today."""
    assert run_arguments(monkeypatch, *former) == run_arguments(monkeypatch, *current)
    assert run_arguments(monkeypatch, *former).selection_report == is_wanted


def test_a_recipe_of_either_name_is_the_same_and_the_command_line_wins(monkeypatch, tmp_path):
    """The flags of a recipe are those of the command line."""
    former, current = tmp_path / "former.yaml", tmp_path / "current.yaml"
    former.write_text("picture: no")
    current.write_text("selection_report: no")
    for path in map(str, (former, current)):
        assert not run_arguments(monkeypatch, path).selection_report
        assert run_arguments(monkeypatch, path, "--picture", "true").selection_report
        assert run_arguments(monkeypatch, path, "--selection_report", "true").selection_report


@pytest.mark.parametrize(
    "words", [["--picture", "no", "--selection_report", "yes"], ["--no_picture", "--selection-report=yes"]], ids=str
)
def test_both_names_of_a_flag_are_refused(monkeypatch, words):
    """Which of the two counts would be a guess."""
    with pytest.raises(SMTError, match=r"^--picture and --selection_report are two names .* give one of them$"):
        run_arguments(monkeypatch, *words)


def test_both_names_in_a_recipe_are_refused(monkeypatch, tmp_path):
    """As on the command line; the message names the file."""
    path = tmp_path / "recipe.yaml"
    path.write_text("picture: no\nselection_report: yes")
    with pytest.raises(SMTError, match=r"recipe\.yaml: picture and selection_report are two names .* of them$"):
        run_arguments(monkeypatch, str(path))
