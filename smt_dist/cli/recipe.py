"""Read recipes: the flags of a run in a YAML or JSON file, before the command line's own.

``smt-train recipe.yaml --seed 1`` is ``smt-train --KEY=VALUE ... --seed 1``: the last one wins. A value is what would
stand on the command line, letter by letter, as YAML's own types would make ``no`` false, ``010`` eight and ``1e-4`` a
word. Only inside a mapping (``lr_scheduler_kwargs: {num_cycles: 0.5}``) are numbers numbers.
"""

from __future__ import annotations

import dataclasses
import json
import re
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from smt_dist.cli.former_flags import FORMER_FLAGS, refuse_both_names
from smt_dist.errors import SMTError, whole_message
from smt_dist.files import parse_json_object, read_text, shorten

SUFFIXES = (".yaml", ".yml", ".json")
MAX_CHARACTERS = 2**17  # written by hand; YAML's reader takes a second for as many
_LOCAL_RANK = re.compile(r"--local[-_]rank=\d+")
_TEXT, _NULL = "tag:yaml.org,2002:str", "tag:yaml.org,2002:null"
_TAGS = {_TEXT, _NULL, *(f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "timestamp", "seq", "map"))}


def expand_recipe(words: list[str], parser: ArgumentParser, kinds: Sequence[type]) -> list[str]:
    """Put a recipe's flags in its place, where a command line begins with one.

    Args:
        words: the command line, without the program's name.
        parser: tries each key's flag by itself, so that an error names file and key. Its ``error`` raises SMTError.
        kinds: the dataclasses whose fields are the flags.

    Raises:
        SMTError: the file can't be read, or a key or a value isn't what the flags take; names both.
    """
    # DeepSpeed's launcher puts --local_rank=N before everything else.
    start = 1 if words and _LOCAL_RANK.fullmatch(words[0]) else 0
    if len(words) <= start or words[start].startswith("-"):
        return words
    path, rest = words[start], words[start + 1 :]
    content = read_recipe(path)
    if rest and not rest[0].startswith("-"):  # otherwise a recipe's last list would take it as an item
        raise SMTError(f"{shorten(rest[0])}: only flags follow a recipe (see --help)")
    refuse_both_names(content, f"{path}: ")
    takes_mapping = _takes_mapping(kinds)
    flags = []
    for name, value in content.items():
        key = FORMER_FLAGS.get(name, name)
        if key not in takes_mapping:
            near = get_close_matches(key, takes_mapping, 1)
            hint = f"did you mean {near[0]}?" if near else "keys are flags without -- (see --help)"
            raise SMTError(f"{path}: {shorten(key)}: unknown key; {hint}")
        if isinstance(value, dict) and not takes_mapping[key]:
            raise SMTError(f"{path}: {key}: takes no mapping")
        flags += _flag(path, key, value, parser)
    return [*words[:start], *flags, *rest]


def _takes_mapping(kinds: Sequence[type]) -> dict[str, bool]:
    """Map each flag to whether it takes a mapping, as JSON text."""
    return {
        field.name: any((get_origin(hint) or hint) is dict for hint in get_args(hints[field.name]))
        for kind in kinds
        for hints in (get_type_hints(kind),)
        for field in dataclasses.fields(kind)
        if field.init
    }


def _flag(path: str, key: str, value: Any, parser: ArgumentParser) -> list[str]:
    """Return one key as words of a command line, after parsing them; none without a value."""
    if value is None:
        return []
    items = value if isinstance(value, list) else [value]
    if isinstance(value, list) and (not items or any(item is None or isinstance(item, list | dict) for item in items)):
        raise SMTError(f"{path}: {key}: a list holds one value or more, and no lists, mappings or nulls")
    if len(items) > 1 and any(str(item).startswith("-") for item in items):
        raise SMTError(f"{path}: {key}: an item of a list can't begin with a dash: it would be a flag of its own")
    # Behind = a value may begin with a dash.
    words = [f"--{key}={_word(items[0])}"] if len(items) == 1 else [f"--{key}", *map(_word, items)]
    try:
        _, left = parser.parse_known_args(words)
    except SMTError as error:
        raise SMTError(f"{path}: {key}: {str(error).removeprefix(f'--{key}: ')}") from None
    if left:
        raise SMTError(f"{path}: {key}: takes one value, not {len(items)}")
    return words


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def read_recipe(path: str) -> dict[str, Any]:
    """Read a recipe's keys and values.

    A value is text, a list of texts, a mapping or None; from JSON also a number or a boolean.

    Raises:
        SMTError: it can't be read, or holds no flags; names the file.
    """
    if not path.endswith(SUFFIXES):
        raise SMTError(f"{shorten(path)}: neither a flag nor a recipe, which ends in {', '.join(SUFFIXES)}")
    text = read_text(path).removeprefix("\ufeff")
    if len(text) > MAX_CHARACTERS:
        raise SMTError(f"{path}: {len(text):,} characters are too many for a recipe; at most {MAX_CHARACTERS:,}")
    content = parse_json_object(text, path) if path.endswith(".json") else _parse_yaml(text, path)
    if not content:
        raise SMTError(f"{path}: holds no flags; write them as `name: value`, one a line")
    return content


class _Loader(yaml.SafeLoader):
    """Compose nodes without aliases, and construct no objects.

    With aliases a few lines can expand to gigabytes.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="a recipe has no aliases", problem_mark=mark)
        return super().compose_node(parent, index)


def _parse_yaml(text: str, path: str) -> dict[str, Any]:
    try:
        root = yaml.compose(text, Loader=_Loader)
        if not isinstance(root, yaml.MappingNode):
            return {}
        return {key: _plain(node, typed=False) for key, node in _pairs(root)}
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise SMTError(f"{path}{line}: not a recipe's YAML ({error.problem})") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise SMTError(f"{path}: not a recipe's YAML ({whole_message(error)})") from None


def _plain(node: yaml.Node, typed: bool) -> Any:
    """Return a node's content; if ``typed``, with JSON's numbers and booleans."""
    if node.tag not in _TAGS:
        raise yaml.MarkedYAMLError(problem=f"a recipe has no values of {node.tag}", problem_mark=node.start_mark)
    if isinstance(node, yaml.MappingNode):
        return {key: _plain(child, typed=True) for key, child in _pairs(node)}
    if isinstance(node, yaml.SequenceNode):
        return [_plain(child, typed) for child in node.value]
    if node.tag == _NULL:
        return None
    if not typed or node.style is not None:  # quoted
        return node.value
    try:
        return json.loads(node.value)
    except ValueError:
        return node.value


def _pairs(node: yaml.MappingNode) -> Iterator[tuple[str, yaml.Node]]:
    seen = set()
    for key, child in node.value:
        if key.tag != _TEXT:
            raise yaml.MarkedYAMLError(problem="a key is a name", problem_mark=key.start_mark)
        if key.value in seen:
            raise yaml.MarkedYAMLError(problem=f"{shorten(key.value)} appears twice", problem_mark=key.start_mark)
        seen.add(key.value)
        yield key.value, child
