"""YAML as recipes use it: read with the line of every value, refused where ambiguous, written back.

Differences from PyYAML's safe loader, each because of a mistake it would let through: a duplicate key
is an error, `1e-3` is a number (YAML 1.1 wants `1.0e-3` and reads a string otherwise), and a date is
a string.
"""

import re
from dataclasses import dataclass
from typing import Any

import yaml

from trainer import RecipeError

FieldPath = tuple[str, ...]
"""A field's place in a recipe, such as ("optimisation", "learning_rate")."""

_FLOAT = re.compile(
    r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$|^\.(?:nan|NaN|NAN)$"
)


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """PyYAML's guesses from a plain scalar's text to its type, with our floats and without dates."""
    replaced = {"tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"}
    table = {
        first: [(tag, pattern) for tag, pattern in entries if tag not in replaced]
        for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for first in "-+0123456789.":
        table.setdefault(first, []).insert(0, ("tag:yaml.org,2002:float", _FLOAT))
    return table


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _resolvers()


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _resolvers()


_Dumper.add_representer(
    list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, flow_style=True)
)


@dataclass(frozen=True)
class YamlText:
    """A YAML document as plain data, and the line (counted from 1) on which each field's key stands."""

    value: Any
    lines: dict[FieldPath, int]


def parse_yaml(text: str, source: str) -> YamlText:
    """Read one YAML document.

    Args:
        text: the document.
        source: what to call it in messages: a file name, or an override as it was typed.

    Raises:
        RecipeError: not valid YAML, or a key that occurs twice; with source and line.
    """
    loader = _Loader(text)
    lines: dict[FieldPath, int] = {}
    try:
        node = loader.get_single_node()
        value = None if node is None else _construct(loader, node, (), lines, source)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}" if mark else source
        raise RecipeError(f"{place}: not valid YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{source}: not valid YAML: {error}") from error
    finally:
        loader.dispose()
    return YamlText(value, lines)


def _construct(
    loader: _Loader, node: yaml.Node, path: FieldPath, lines: dict[FieldPath, int], source: str
) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, item, (*path, str(i)), lines, source) for i, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value)
        line = key_node.start_mark.line + 1
        field = (*path, key)
        if key in mapping:
            raise RecipeError(
                f"{source}:{line}: {'.'.join(field)}: set twice, first on line {lines[field]}; "
                "keep one of the two"
            )
        lines[field] = line
        mapping[key] = _construct(loader, value_node, field, lines, source)
    return mapping


def dump_yaml(value: dict[str, Any]) -> str:
    """Write plain data so that `parse_yaml` gives it back: keys in their order, lists on one line."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
