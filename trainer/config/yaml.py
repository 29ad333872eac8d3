"""YAML of recipes: parsed with the line of every value, refused where ambiguous, and written.

Differences from PyYAML's safe loader, each for a mistake that it would accept: a duplicate key is an error,
`1e-3` is a number (YAML 1.1 requires `1.0e-3`, and reads `1e-3` as text), a date is text, and `010` and
`1:30`, which YAML 1.1 reads as 8 and 90, are errors. Tags for other things than text, numbers, true, false,
null, lists and mappings are refused, as are merge keys.

Parsing takes bounded time and memory for any text: depth, number of values, and length are limited after
aliases are expanded.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.reader import ReaderError

from trainer.errors import RecipeError
from trainer.secrets import redacted

FieldPath = tuple[str, ...]
"""A field's names from the top of a recipe, such as ("optimisation", "learning_rate")."""

MAX_TEXT = 2**18
"""Characters of one document, and of all its values after aliases are expanded."""
MAX_VALUES = 10_000
"""Values of one document, each mapping and each list counted too, after aliases are expanded."""
MAX_DEPTH = 32
"""Mappings and lists inside each other."""
_MAX_INTEGER = 25  # characters: enough for 64 bits in any base but 2
_MAX_FORMATTED = 200  # characters of a value in a message

_FLOAT = re.compile(
    r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|[0-9][0-9_]*[eE][-+]?[0-9]+"
    r"|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
    r"|\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$|^\.(?:nan|NaN|NAN)$"
)
_CORE = "tag:yaml.org,2002:"
_SCALARS = {_CORE + kind for kind in ("str", "int", "float", "bool", "null")}
_OTHERS_OF_YAML = {_CORE + kind for kind in ("binary", "timestamp", "set", "omap", "pairs", "seq", "map")}
_NO_TEXT = re.compile("[\\0\\ud800-\\udfff]")  # NUL, and halves of characters
_NOT_AS_WRITTEN = re.compile(r"^[-+]?(?:0[0-9_]+|[0-9_]+(?::[0-9_]+)+)$")  # octal and base 60


def _resolvers(without: frozenset[str]) -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """PyYAML's patterns from a plain scalar's text to its type, with `_FLOAT` and without dates."""
    replaced = {_CORE + kind for kind in ("float", "timestamp", *without)}
    table = {
        first: [(tag, pattern) for tag, pattern in entries if tag not in replaced]
        for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for first in "-+0123456789.":
        table.setdefault(first, []).insert(0, (_CORE + "float", _FLOAT))
    return table


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _resolvers(frozenset({"merge", "value"}))

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._composed = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._depth += 1
        self._composed += 1
        mark = self.peek_event().start_mark
        if self._depth > MAX_DEPTH + 1:
            raise _Refused(mark.line + 1, f"more than {MAX_DEPTH} lists and mappings inside each other")
        if self._composed > 2 * MAX_VALUES:
            raise _Refused(mark.line + 1, f"more than {MAX_VALUES:,} values")
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _resolvers(frozenset())  # a text `<<` is written in quotes


_Dumper.add_representer(
    list, lambda dumper, value: dumper.represent_sequence(_CORE + "seq", value, flow_style=True)
)


class _Refused(Exception):
    """YAML that recipes do not accept. where: the field, if known."""

    def __init__(self, line: int, reason: str, where: FieldPath = ()) -> None:
        super().__init__(reason)
        self.line = line
        self.where = where


@dataclass(frozen=True)
class YamlDocument:
    """A parsed YAML document."""

    value: Any
    """As plain data."""
    lines: dict[FieldPath, int]
    """The line of each field's key, counted from 1."""
    written: dict[FieldPath, str] = field(default_factory=dict)
    """The text of those plain values that YAML reads as something else, such as `yes` or `1e999`."""


def parse_yaml(text: str, source: str) -> YamlDocument:
    """Read one YAML document.

    Args:
        text: the document.
        source: its name in messages: a file name, or an override as it was typed.

    Raises:
        RecipeError: not valid YAML, a duplicate key, or larger or deeper than a recipe may be; with source
            and line.
    """
    loader = None
    try:
        if len(text) > MAX_TEXT:
            raise RecipeError(f"{source}: {len(text):,} characters; a recipe has at most {MAX_TEXT:,}")
        loader = _Loader(text)
        node = loader.get_single_node()
        builder = _Builder(loader)
        value = None if node is None else builder.build(node, ())
    except _Refused as error:
        name = f" {format_path(error.where)}:" if error.where else ""
        raise RecipeError(f"{_location(source, error.line)}:{name} {error}") from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        code = f"U+{error.character:04X}" if isinstance(error.character, int) else str(error.character)
        raise RecipeError(
            f"{_location(source, line)}: not valid YAML: the character {code} is not allowed; leave it "
            'out, or write it as an escape in double quotes, such as "\\x07"'
        ) from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        location = _location(source, mark.line + 1) if mark else source
        hint = "; indent with spaces, not tabs" if "'\\t'" in str(error.problem) else ""
        raise RecipeError(f"{location}: not valid YAML: {format_text(str(error.problem))}{hint}") from error
    except (yaml.YAMLError, ValueError, OverflowError, LookupError, TypeError, AttributeError) as error:
        # PyYAML does not catch numbers of escapes and directives that Python cannot convert.
        location = source if loader is None else _location(source, loader.line + 1)
        raise RecipeError(f"{location}: not valid YAML: {format_text(str(error))}") from error
    finally:
        if loader is not None:
            loader.dispose()
    return YamlDocument(value, builder.lines, builder.written)


def _location(source: str, line: int) -> str:
    """`file:line`; an option of the command line has no line."""
    return source if source.startswith("--") else f"{source}:{line}"


class _Builder:
    """Builds plain data from YAML's nodes."""

    def __init__(self, loader: _Loader) -> None:
        self.lines: dict[FieldPath, int] = {}
        self.written: dict[FieldPath, str] = {}
        self._loader = loader
        self._values = 0
        self._characters = 0
        self._around: set[int] = set()  # ids of the nodes around the one being built

    def build(self, node: yaml.Node, path: FieldPath) -> Any:
        line = node.start_mark.line + 1
        if id(node) in self._around:
            raise _Refused(line, "an alias (*name) inside its own value", path)
        if len(self._around) >= MAX_DEPTH and not isinstance(node, yaml.ScalarNode):
            raise _Refused(line, f"more than {MAX_DEPTH} lists and mappings inside each other", path)
        self._count(node, path)
        self._around.add(id(node))
        try:
            if isinstance(node, yaml.ScalarNode):
                return self._scalar(node, path)
            kind = "seq" if isinstance(node, yaml.SequenceNode) else "map"
            if node.tag != _CORE + kind:
                raise _Refused(line, _wrong_tag(node.tag), path)
            if isinstance(node, yaml.SequenceNode):
                return [self.build(item, (*path, str(i))) for i, item in enumerate(node.value)]
            return self._mapping(node, path)
        finally:
            self._around.discard(id(node))

    def _count(self, node: yaml.Node, path: FieldPath) -> None:
        self._values += 1
        if isinstance(node, yaml.ScalarNode):
            self._characters += len(node.value)
        if self._values > MAX_VALUES or self._characters > MAX_TEXT:
            most = f"{MAX_VALUES:,} values" if self._values > MAX_VALUES else f"{MAX_TEXT:,} characters"
            raise _Refused(
                node.start_mark.line + 1, f"more than {most}, every alias (*name) counted as a copy", path
            )

    def _mapping(self, node: yaml.Node, path: FieldPath) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = self._key(key_node, path)
            field = (*path, key)
            if key in mapping:
                raise _Refused(
                    line, f"set twice, first on line {self.lines[field]}; keep one of the two", field
                )
            self.lines[field] = line
            mapping[key] = self.build(value_node, field)
        return mapping

    def _key(self, node: yaml.Node, path: FieldPath) -> str:
        """A field's name as it is written: `1` and `yes` are names too."""
        line = node.start_mark.line + 1
        if not isinstance(node, yaml.ScalarNode):
            raise _Refused(line, "a field's name is text, not a list or a mapping", path)
        if node.tag not in _SCALARS:
            raise _Refused(line, _wrong_tag(node.tag), path)
        if node.value == "<<" and node.style is None:
            raise _Refused(line, "recipes have no merge keys (<<); inherit with `base: other.yaml`", path)
        if not node.value:
            raise _Refused(line, "a field without a name", path)
        self._count(node, path)
        _check_characters(node.value, line, path)
        return str(node.value)

    def _scalar(self, node: yaml.ScalarNode, path: FieldPath) -> Any:
        line, text, kind = node.start_mark.line + 1, str(node.value), str(node.tag).removeprefix(_CORE)
        if node.tag in _OTHERS_OF_YAML:
            raise _Refused(line, _wrong_tag(node.tag), path)
        _check_characters(text, line, path)
        if kind == "int" and len(text.replace("_", "").lstrip("+-")) > _MAX_INTEGER:
            reason = f"an integer of {len(text)} characters; allowed: at most {_MAX_INTEGER}"
            raise _Refused(line, reason, path)
        try:
            value = self._loader.construct_object(node)
        except (ValueError, LookupError, OverflowError, TypeError, AttributeError):
            raise _Refused(line, f"{format_text(text)} is no !!{kind}", path) from None
        if kind == "int" and _NOT_AS_WRITTEN.match(text):
            base = "base 60" if ":" in text else "octal"
            reason = f"YAML reads {text} as {base}: {value}; write {value}, or '{text}' for text"
            raise _Refused(line, reason, path)
        if node.style is None and _is_read_otherwise(text, value):
            self.written[path] = text
        return value


def _is_read_otherwise(text: str, value: Any) -> bool:
    """Whether YAML reads a plain value as something that its author may not expect."""
    if isinstance(value, bool):
        return text.lower() not in ("true", "false")
    if isinstance(value, int):
        return text.removeprefix("+") != str(value)
    return isinstance(value, float) and not math.isfinite(value) and not text.lstrip("+-").startswith(".")


def _check_characters(text: str, line: int, path: FieldPath) -> None:
    if found := _NO_TEXT.search(text):
        raise _Refused(line, f"text may not hold the character U+{ord(found[0]):04X}", path)


def _wrong_tag(tag: str) -> str:
    name = "!!" + tag.removeprefix(_CORE) if tag.startswith(_CORE) else tag
    return (
        f"the tag {format_text(name)} is not allowed; a recipe holds text, numbers, true, false, null, "
        "lists and mappings"
    )


def format_text(text: str, most: int = _MAX_FORMATTED) -> str:
    """Text for a message: on one line, printable, shortened, without an address's password."""
    start = redacted(text[: most + 1100])  # a password may begin before the cut and end after it
    cut = start if len(text) <= most else f"{start[:most]}... ({len(text):,} characters)"
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in cut
    )


def format_path(path: FieldPath) -> str:
    """A field's dotted name for a message."""
    return format_text(".".join(format_text(key, 80) for key in path))


def dump_yaml(value: dict[str, Any]) -> str:
    """Plain data as YAML that `parse_yaml` reads back: keys in their order, lists on one line."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)
