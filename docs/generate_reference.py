"""Write the generated parts of docs/reference/*.md from the programs' flags and the config's fields.

python docs/generate_reference.py            (writes what has changed)
python docs/generate_reference.py --check    (writes nothing; ends with 1 where a page is stale)

A page keeps its prose. Generated is what stands between ``<!-- generated: NAME -->`` and ``<!-- end: NAME -->``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from inspect import getdoc
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "reference"
BENCHMARKS = ROOT / "launch" / "benchmarks"
# Program -> the module whose main reads the command line.
PARSERS = {
    "smt-merge": "smt_dist.cli.merge",
    "smt-evaluate": "smt_dist.cli.evaluate",
    "smt-plan": "smt_dist.cli.plan",
    "compare": "compare",
    "step": "step",
    "communication": "communication",
    "capacity": "capacity",
}
# What a help text says of a default that the parser has as None.
STATED = {"none": "", "all": "all", "the base's": "the base's"}
COLUMNS = ("flag", "takes", "default", "meaning")


class _Captured(Exception):
    """Carries a parser out of a program's main."""


def capture_parser(main: Callable[[], object]) -> argparse.ArgumentParser:
    """Return the parser with which ``main`` reads its command line."""

    def stop(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise _Captured(parser)

    with patch.object(argparse.ArgumentParser, "parse_args", stop):
        try:
            main()
        except _Captured as captured:
            return captured.args[0]
    raise AssertionError("main has read no command line")


# -- flags -------------------------------------------------------------------------------------------------------


def flag_table(parser: argparse.ArgumentParser, names: Iterable[str] | None = None) -> str:
    """Make a table of a parser's flags.

    Args:
        parser: whose flags.
        names: of the flags to show, in this order; default: all but --help.
    """
    actions = {action.dest: action for action in reversed(parser._actions) if action.option_strings}
    shown = [action.dest for action in parser._actions if action.dest in actions] if names is None else list(names)
    rows = [
        _flag_row(actions[name])
        for name in dict.fromkeys(shown)
        if name != "help" and actions[name].help != argparse.SUPPRESS
    ]
    return table(COLUMNS, rows)


def _flag_row(action: argparse.Action) -> list[str]:
    text = argparse.HelpFormatter("")._expand_help(action) if action.help else ""
    default = _default_of(action)
    if (stated := re.search(r" \(default: ([^()]*)\)$", text)) and (default or stated[1] in STATED):
        text = text[: stated.start()]
        default = default or STATED[stated[1]]
    return [f"`{action.option_strings[0]}`", _takes(action), default, text]


def _takes(action: argparse.Action) -> str:
    if action.nargs == 0:
        return "nothing"
    kind = {"int": "number", "float": "number", "positive_int": "number", "natural": "number", "Path": "path"}.get(
        getattr(action.type, "__name__", ""), "text"
    )
    if action.choices:
        kind = ", ".join(f"`{choice}`" for choice in action.choices)
    elif "bool" in getattr(action.type, "__name__", "") or getattr(action.type, "__name__", "") == "yes_or_no":
        kind = "`true`, `false`"
    return f"{kind}; several" if action.nargs in ("+", "*") else kind


def _default_of(action: argparse.Action) -> str:
    if action.required:
        return "required"
    if action.default is None or action.default == argparse.SUPPRESS:
        return ""
    value = action.default
    if isinstance(value, list | tuple):
        return ", ".join(f"`{item}`" for item in value)
    return f"`{json.dumps(value) if isinstance(value, bool) else value}`"


def training_parser(kind: type) -> argparse.ArgumentParser:
    """Make the parser of smt-train and smt-select."""
    from transformers import HfArgumentParser

    from smt_dist.training.arguments import SMTTrainingArguments

    return HfArgumentParser([kind, SMTTrainingArguments], allow_abbrev=False)


def flags() -> dict[str, str]:
    """Make the generated parts of flags.md."""
    from transformers import TrainingArguments

    from smt_dist.cli.select import SelectArguments
    from smt_dist.training import arguments
    from smt_dist.training.run_arguments import RunArguments

    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    run = [field.name for field in fields(RunArguments)]
    own = vars(arguments.SMTTrainingArguments)["__annotations__"]
    training = [field.name for field in fields(arguments.SMTTrainingArguments) if field.name in own]
    inherited = {field.name for field in fields(TrainingArguments)}
    select = [field.name for field in fields(SelectArguments) if field.name not in run]
    parser = training_parser(SelectArguments)
    parts = {
        "run": flag_table(parser, run),
        "training": flag_table(parser, [name for name in training if name not in inherited]),
        "changed": flag_table(parser, [name for name in training if name in inherited]),
        "select": flag_table(parser, select),
        "refused": table(("flag", "reason"), [[f"`--{name}`", why] for name, why in arguments._REFUSED.items()]),
    }
    for program, module in PARSERS.items():
        found = capture_parser(importlib.import_module(module).main)
        commands = [action for action in found._actions if isinstance(action, argparse._SubParsersAction)]
        parts[program] = flag_table(commands[0].choices["plan"] if commands else found)
    return parts


# -- config ------------------------------------------------------------------------------------------------------


def config() -> dict[str, str]:
    """Make the generated parts of config.md: a table for each section of the SMT config."""
    from smt_dist import config

    sections = {
        "top": config.SMTConfig,
        "groups": config.GroupConfig,
        "selection": config.SelectionConfig,
        "warmup": config.WarmupConfig,
        "reselect": config.ReselectConfig,
        "non_finite": config.NonFiniteConfig,
    }
    constants = {name: value for name, value in vars(config).items() if name.isupper()}
    return {name: _section_table(model, constants) for name, model in sections.items()} | {
        "default": f"```json\n{_by_current_names(config.SMTConfig().to_json()).strip()}\n```",
    }


def _by_current_names(text: str) -> str:
    """Replace the former names that the package writes, for older versions to read, by those that it documents."""
    return text.replace('"bad_numbers"', '"non_finite"').replace('"probe"', '"scoring"')


def _section_table(model: Any, constants: Mapping[str, Any]) -> str:
    described = attributes_of(getdoc(model) or "", constants)
    rows = []
    for name, schema in model.model_json_schema(by_alias=False)["properties"].items():
        required = model.model_fields[name].is_required()
        default = "required" if required else _default_in(schema, model.model_fields[name])
        rows.append([f"`{name}`", _values(schema), default, described[name]])
    return table(("key", "values", "default", "meaning"), rows)


def attributes_of(doc: str, constants: Mapping[str, Any]) -> dict[str, str]:
    """Read a docstring's ``Attributes:`` section as field -> Markdown."""
    section = re.split(r"^Attributes:\n", doc, flags=re.MULTILINE)[1]
    found = {}
    for name, text in re.findall(r"^    (\w+): (.*(?:\n        .*)*)", section, re.MULTILINE):
        found[name] = _markdown(" ".join(text.split()), constants)
    return found


def _markdown(text: str, constants: Mapping[str, Any]) -> str:
    def link(match: re.Match[str]) -> str:
        value = constants.get(match[1])
        return ", ".join(f"`{item}`" for item in value) if isinstance(value, tuple) else f"`{match[1]}`"

    text = re.sub(r":\w+:`~?([\w.]+)`", link, text)
    return text.replace("``", "`").replace(r"\|", "|")


def _default_in(schema: Mapping[str, Any], field: Any) -> str:
    value = schema.get("default", field.default)
    if isinstance(value, dict) or field.default_factory is not None:
        return "see below"
    return "" if value is None else f"`{json.dumps(value)}`"


def _values(schema: Mapping[str, Any]) -> str:
    """Say in words what a JSON schema takes."""
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(filter(None, map(_values, schema["anyOf"]))))
    if "$ref" in schema:
        return "section"
    if "const" in schema:
        return f'`"{schema["const"]}"`'
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    kind = schema.get("type")
    if kind == "array":
        if "prefixItems" in schema:
            return "`[rows, columns]`"
        return "list of sections" if "$ref" in schema["items"] else f"list of {_values(schema['items'])}"
    limits = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    words = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true`, `false`", "null": ""}
    return ", ".join([words[kind], *(f"{sign} {schema[key]}" for key, sign in limits.items() if key in schema)])


# -- pages -------------------------------------------------------------------------------------------------------


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Make a Markdown table."""
    columns = list(columns)
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def fill(text: str, parts: Mapping[str, str]) -> str:
    """Put the generated parts into a page. Raises ValueError where page and parts have different names."""
    names = re.findall(r"<!-- generated: (\S+) -->", text)
    if sorted(names) != sorted(parts):
        raise ValueError(f"the page has the parts {sorted(names)}, generated are {sorted(parts)}")
    for name, part in parts.items():
        begin, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{part}\n\n{end}{rest.partition(end)[2]}"
    return text


def pages() -> dict[Path, str]:
    """Make every page as it should be."""
    made = {FOLDER / "flags.md": flags, FOLDER / "config.md": config}
    return {path: fill(path.read_text(), make()) for path, make in made.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 where a page is stale")
    check = parser.parse_args().check
    stale = {path: text for path, text in pages().items() if path.read_text() != text}
    for path, text in stale.items():
        print(f"{path.relative_to(ROOT)} {'is stale' if check else 'written'}")
        if not check:
            path.write_text(text)
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
