"""Loads a `Recipe` from YAML files: inheritance, overrides, error messages with file and line."""

import difflib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from models.config import is_field
from trainer.config.recipe_names import find_base, find_recipe
from trainer.config.reference_docs import allowed, choices, section_of
from trainer.config.schema import ALTERNATIVES, ENGINE_AUTO, Recipe
from trainer.config.text_file import read_text
from trainer.config.value_types import RUN_NAME, FieldError
from trainer.config.yaml import (
    MAX_DEPTH,
    MAX_TEXT,
    FieldPath,
    YamlDocument,
    format_path,
    format_text,
    parse_yaml,
)
from trainer.errors import RecipeError

MAX_CHAIN = 16
"""Recipes that inherit from each other."""
RENAMED = {("model", "image_weights"): "model.weights"}
_LONGEST_NAME = 200
_MAX_MISTAKES = 20  # lines of one message
_MAX_NEIGHBOURS = 1000  # files of a folder that are compared with the name of a missing one


@dataclass
class _Layered:
    """Values merged from several layers."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[FieldPath, str] = field(default_factory=dict)
    """By field, what set it last: `file:line`, or an override."""
    written: dict[FieldPath, str] = field(default_factory=dict)
    """The text of those values that YAML reads as something else."""

    def add(
        self, layer: dict[str, Any], origins: dict[FieldPath, str], written: dict[FieldPath, str]
    ) -> None:
        if layer.get("engine") == "auto":  # a text would be replaced by the next layer's mapping
            layer = {**layer, "engine": dict(ENGINE_AUTO)}
        for section, one, other in ALTERNATIVES:
            for given, displaced in ((one, other), (other, one)):
                if _has(layer, section, given) and not _has(layer, section, displaced):
                    inherited = self.values.get(section)
                    if isinstance(inherited, dict):
                        inherited.pop(displaced, None)
        _merge(self.values, layer)
        self.origins.update(origins)
        for path in origins:
            self.written.pop(path, None)
        self.written.update(written)

    def origin(self, path: FieldPath) -> str | None:
        """What set the field, or the closest section around it that a file or an override sets."""
        while path:
            if path in self.origins:
                return self.origins[path]
            path = path[:-1]
        return None

    def found(self, path: FieldPath) -> str:
        """The value of a field, for a message."""
        return _found(self.value(path))

    def value(self, path: FieldPath) -> Any:
        value: Any = self.values
        for key in path:
            value = value[key] if isinstance(value, dict) else None
        return value


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe with all it inherits, apply overrides, check every value.

    Args:
        path: the recipe, or its name (see `find_recipe`). `base:` is relative to the file that names it; of
            several bases the later one wins, and a file that they share is applied once, first.
        overrides: `section.field=value`, the value read as YAML; applied in order, after all files.

    Raises:
        RecipeError: a file is missing or is not an ordinary file of YAML, bases form a circle, or fields are
            wrong; one line per mistake with file and line, dotted field, found value, allowed values.
    """
    path = find_recipe(Path(path))
    order: dict[str, tuple[Path, YamlDocument]] = {}  # the bases first, each file once
    _add_with_bases(path, "", "", [], order)
    files = list(order.values())
    layered = _Layered()
    layered.add({"tracking": {"experiment": _family(files)}}, {}, {})
    for file, document in files:
        location = format_text(str(file))
        layered.add(
            document.value,
            {name: f"{location}:{line}" for name, line in document.lines.items()},
            document.written,
        )
    for override in overrides:
        layered.add(*_parse_override(override))
    try:
        return Recipe.model_validate_json(json.dumps(layered.values), strict=True)
    except ValidationError as error:
        raise RecipeError("\n".join(_messages(error, layered, path))) from None


def read_stored_recipe(values: dict[str, Any]) -> Recipe | None:
    """The recipe stored with weights; None if there is none or if another version's does not fit."""
    try:
        return Recipe.model_validate_json(json.dumps(values)) if values else None
    except ValidationError:
        return None


def _add_with_bases(
    path: Path, named_by: str, base: str, above: Sequence[Path], order: dict[str, tuple[Path, YamlDocument]]
) -> None:
    """Append a recipe to `order`, by its real path, after those of its bases that are not there yet.

    named_by, base: as for `_read`. above: the recipes that lead here, the user's first.
    """
    document = _read(path, named_by, base, above)
    real = os.path.realpath(path)
    if real in map(os.path.realpath, above):
        circle = " -> ".join(format_text(str(file)) for file in [*above, path])
        raise RecipeError(f"{named_by}base: recipes inherit in a circle: {circle}")
    if real in order:
        return
    if len(above) + len(order) >= MAX_CHAIN:
        raise RecipeError(f"{named_by}base: more than {MAX_CHAIN} recipes inherit from each other")
    bases = document.value.pop("base", [])
    location = f"{format_text(str(path))}:{document.lines.get(('base',), 1)}: "
    for name in bases if isinstance(bases, list) else [bases]:
        if not isinstance(name, str) or not name:
            raise RecipeError(
                f"{location}base: found {_found(name)}; allowed: the path of a recipe, or a list of paths"
            )
        try:
            found = find_base(name, path.parent)
        except RecipeError as error:
            raise RecipeError(f"{location}base: {error}") from error
        _add_with_bases(found, location, name, [*above, path], order)
    order[real] = path, document


def _family(files: Sequence[tuple[Path, YamlDocument]]) -> str:
    """The name that a recipe and its variants share: of the first one that is not a part (`_name.yaml`)."""
    whole = [(file, document) for file, document in files if not file.name.startswith("_")] or files
    file, document = whole[0]
    name = document.value.get("name")
    if isinstance(name, str) and len(name) <= _LONGEST_NAME and re.match(RUN_NAME, name):
        return name
    return re.sub(r"[^A-Za-z0-9._-]", "_", file.stem[:_LONGEST_NAME])


def _read(path: Path, named_by: str, base: str, seen: Sequence[Path]) -> YamlDocument:
    """A recipe's own fields.

    named_by: the file and line that name it as their base, for messages. base: the value there, empty for the
    recipe itself. seen: the files read before; the last one names it.
    """
    name = format_text(str(path))
    try:
        text = read_text(path, most=MAX_TEXT)
    except OSError as error:
        hint = _base_hint(base, seen) if base else neighbour_hint(path)
        raise RecipeError(f"{named_by}cannot read the recipe {name}: {error.strerror}{hint}") from error
    except ValueError as error:
        raise RecipeError(f"{named_by}cannot read the recipe {name}: {error}") from error
    document = parse_yaml(text, name)
    if not isinstance(document.value, dict):
        raise RecipeError(f"{name}: found {_found(document.value)}; a recipe is a mapping of sections")
    return document


def neighbour_hint(path: Path) -> str:
    """A hint at a recipe of nearly the same name, or nothing."""
    names = [name for name in _recipes_in(path.parent) if not name.startswith("_")]
    near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.75)
    return f"; did you mean {path.parent / near[0]}?" if near and near[0] != path.name else ""


def _base_hint(base: str, seen: Sequence[Path]) -> str:
    """A hint at the path of an existing recipe for a base that does not exist, or nothing.

    seen: the files read before; a base that is one of them would be a circle.
    """
    folder = seen[-1].parent
    relative = "; a base is relative to the file that names it"
    # Written relative to the current directory, or with a wrong folder.
    for path in (Path(base), folder / Path(base).name):
        if os.path.isfile(path) and not any(os.path.samefile(path, other) for other in seen):
            return f"{relative}: did you mean {format_text(os.path.relpath(path, folder))}?"
    wanted = folder / base
    names = [
        name
        for name in _recipes_in(wanted.parent)
        if not any(os.path.samefile(wanted.parent / name, other) for other in seen)
    ]
    near = difflib.get_close_matches(wanted.name, names, n=1, cutoff=0.75)
    if near:
        return f"; did you mean {format_text(str(Path(base).parent / near[0]))}?"
    return "" if os.path.isdir(wanted.parent) else relative


def _recipes_in(folder: Path) -> list[str]:
    """The names of the YAML files among the first entries of a folder; none where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            first = islice(entries, _MAX_NEIGHBOURS)
            return sorted(
                entry.name for entry in first if entry.name.endswith((".yaml", ".yml")) and entry.is_file()
            )
    except (OSError, ValueError):
        return []


def _parse_override(
    override: str,
) -> tuple[dict[str, Any], dict[FieldPath, str], dict[FieldPath, str]]:
    """`section.field=value` as a layer of its own."""
    name, equals, text = override.partition("=")
    keys = tuple(name.strip().split("."))
    source = f"--set {format_text(override)}"
    if not equals or not all(keys):
        raise RecipeError(f"{source}: an override has the form section.field=value")
    if len(keys) > MAX_DEPTH or len(name) > MAX_TEXT:
        raise RecipeError(f"{source}: {len(keys)} names in a row; an override has at most {MAX_DEPTH}")
    document = parse_yaml(text, source)
    origins = {keys[:depth]: source for depth in range(1, len(keys) + 1)}
    written = {(*keys, *path): text for path, text in document.written.items()}
    value: Any = document.value
    for key in reversed(keys):
        value = {key: value}
    return value, origins, written


def _has(layer: dict[str, Any], section: str, name: str) -> bool:
    values = layer.get(section)
    return isinstance(values, dict) and values.get(name) is not None


def _merge(into: dict[str, Any], layer: dict[str, Any]) -> None:
    """Mappings merge key by key; any other value, a list too, replaces the earlier one."""
    for key, value in layer.items():
        below = into.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            _merge(below, value)
        else:
            into[key] = value


def _messages(error: ValidationError, layered: _Layered, recipe: Path) -> list[str]:
    """One line for each wrong field; of many, the first ones and the number of the others."""
    # A union of types (number or `auto`) reports once per type: one line per field is enough.
    lines: dict[str, None] = {}
    details = error.errors()
    for done, detail in enumerate(details):
        if len(lines) == _MAX_MISTAKES:
            lines[f"... and up to {len(details) - done:,} mistakes more"] = None
            break
        lines[_message(detail, layered, recipe)] = None
    return list(lines)


def _message(detail: ErrorDetails, layered: _Layered, recipe: Path) -> str:
    """One line for one mistake: file and line, field, found value, allowed values."""
    written = tuple(map(str, detail["loc"]))
    path, section, info = _resolve(written)
    cause = detail.get("ctx", {}).get("error")
    if isinstance(cause, FieldError):
        path = (*path, *cause.below)
    location = layered.origin(path) or format_text(str(recipe))
    name = format_path(path) or "recipe"
    if detail["type"] == "extra_forbidden":
        return f"{location}: {name}: no such field; {_suggest(path, section)}"
    rule = allowed(info) if info else "a mapping of fields"
    if detail["type"] == "missing" and path == written:
        return f"{location}: {name}: missing; allowed: {rule}"
    if detail["type"] == "value_error":
        return f"{location}: {name}: {format_text(str(cause), 1000)}{_reading(path, layered)}"
    hint = _similar(layered.value(path), choices(info.annotation)) if info else ""
    return f"{location}: {name}: found {layered.found(path)}; allowed: {rule}{hint}{_reading(path, layered)}"


def _similar(value: Any, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(value[:100], known, n=1) if isinstance(value, str) else []
    return f"; did you mean {near[0]}?" if near else ""


def _reading(path: FieldPath, layered: _Layered) -> str:
    """How YAML reads a value, where that differs from its text."""
    text = layered.written.get(path)
    return "" if text is None else f" (YAML reads {format_text(text)} as {layered.found(path)})"


def _resolve(written: FieldPath) -> tuple[FieldPath, type[BaseModel], Any]:
    """The field of a pydantic location, its section, its description.

    Within a field, pydantic appends the member of a union or the item of a list. The field as a whole is what
    the user wrote and what `allowed` describes.
    """
    section: type[BaseModel] = Recipe
    info = None
    for depth, name in enumerate(written):
        info = section.model_fields.get(name)
        inner = section_of(info.annotation) if info else None
        if inner is None:
            return written[: depth + 1], section, info
        section = inner
    return written, section, info


def _suggest(path: FieldPath, section: type[BaseModel]) -> str:
    """The nearest right name: in the same section, else the same name elsewhere, else all names there."""
    if path in RENAMED:
        return f"it is {RENAMED[path]} now, which takes the same file"
    wrong = path[-1][:100]
    near = difflib.get_close_matches(wrong, section.model_fields, n=1)
    if near:
        return f"did you mean {format_path((*path[:-1], near[0]))}?"
    if path[:1] == ("model",) and is_field(wrong):
        return f"did you mean model.overrides.{wrong}?"
    elsewhere = [known for known in _all_fields(Recipe, "") if known.split(".")[-1] == wrong]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere)}?"
    return f"allowed: {', '.join(section.model_fields)}"


def _all_fields(section: type[BaseModel], prefix: str) -> Iterable[str]:
    for name, info in section.model_fields.items():
        yield prefix + name
        if inner := section_of(info.annotation):
            yield from _all_fields(inner, f"{prefix}{name}.")


def _found(value: Any) -> str:
    return "nothing (null)" if value is None else format_text(json.dumps(value, ensure_ascii=False))
