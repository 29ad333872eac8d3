"""From recipe files to a `Recipe`: inheritance, overrides, and messages that say where a mistake stands."""

import difflib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from trainer import RecipeError
from trainer.recipe.schema import ALTERNATIVES, ENGINE_AUTO, Recipe
from trainer.recipe.words import allowed, section_of
from trainer.recipe.yaml import FieldPath, parse_yaml


@dataclass
class _Layered:
    """Values merged from several layers, and for each field who set it last (`file:line` or an override)."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[FieldPath, str] = field(default_factory=dict)

    def add(self, layer: dict[str, Any], origins: dict[FieldPath, str]) -> None:
        if layer.get("engine") == "auto":  # else the next layer's mapping would replace it
            layer = {**layer, "engine": dict(ENGINE_AUTO)}
        for section, one, other in ALTERNATIVES:
            for given, displaced in ((one, other), (other, one)):
                if _has(layer, section, given) and not _has(layer, section, displaced):
                    inherited = self.values.get(section)
                    if isinstance(inherited, dict):
                        inherited.pop(displaced, None)
        _merge(self.values, layer)
        self.origins.update(origins)

    def origin(self, path: FieldPath) -> str | None:
        """Who set the field, or else the closest section around it that somebody wrote down."""
        while path:
            if path in self.origins:
                return self.origins[path]
            path = path[:-1]
        return None


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe with all it inherits, apply overrides, check every value.

    Args:
        path: the recipe; its `base:` chain is relative to each naming file.
        overrides: `section.field=value`, the value read as YAML; applied in order, after all files.

    Raises:
        RecipeError: a file is missing or no YAML, bases form a cycle, or fields are wrong; one line per
            mistake with file and line, dotted field, what was found, what is allowed.
    """
    path = Path(path)
    layered = _Layered()
    for file, values, origins in reversed(_chain(path)):
        layered.add(values, {name: f"{file}:{line}" for name, line in origins.items()})
    for override in overrides:
        layered.add(*_parse_override(override))
    try:
        return Recipe.model_validate_json(json.dumps(layered.values), strict=True)
    except ValidationError as error:
        # A choice of types (number or `auto`) reports once per type: one line per field is enough.
        lines = dict.fromkeys(_message(detail, layered, path) for detail in error.errors())
        raise RecipeError("\n".join(lines)) from None


def _chain(path: Path) -> list[tuple[Path, dict[str, Any], dict[FieldPath, int]]]:
    """The recipe and its bases, the recipe first."""
    chain: list[tuple[Path, dict[str, Any], dict[FieldPath, int]]] = []
    seen: list[Path] = []
    named_by = ""
    while True:
        if path.resolve() in [file.resolve() for file in seen]:
            circle = " -> ".join(str(file) for file in [*seen, path])
            raise RecipeError(f"{named_by}base: recipes inherit in a circle: {circle}")
        seen.append(path)
        values, lines = _read(path, named_by)
        chain.append((path, values, lines))
        if "base" not in values:
            return chain
        base = values.pop("base")
        named_by = f"{path}:{lines[('base',)]}: "
        if not isinstance(base, str):
            raise RecipeError(f"{named_by}base: found {_found(base)}; allowed: the path of one recipe")
        path = path.parent / base


def _read(path: Path, named_by: str) -> tuple[dict[str, Any], dict[FieldPath, int]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        near = difflib.get_close_matches(
            path.name, sorted(file.name for file in path.parent.glob("[!_]*.y*ml")), n=1
        )
        hint = f"; did you mean {path.parent / near[0]}?" if near and near[0] != path.name else ""
        raise RecipeError(f"{named_by}cannot read the recipe {path}: {reason}{hint}") from error
    document = parse_yaml(text, str(path))
    if not isinstance(document.value, dict):
        raise RecipeError(f"{path}: found {_found(document.value)}; a recipe is a mapping of sections")
    return document.value, document.lines


def _parse_override(override: str) -> tuple[dict[str, Any], dict[FieldPath, str]]:
    """`section.field=value` as a layer of its own."""
    name, equals, text = override.partition("=")
    keys = tuple(name.strip().split("."))
    source = f"--set {override}"
    if not equals or not all(keys):
        raise RecipeError(f"{source}: an override has the form section.field=value")
    value = parse_yaml(text, source).value
    origins = {keys[:depth]: source for depth in range(1, len(keys) + 1)}
    for key in reversed(keys):
        value = {key: value}
    return value, origins


def _has(layer: dict[str, Any], section: str, name: str) -> bool:
    values = layer.get(section)
    return isinstance(values, dict) and values.get(name) is not None


def _merge(into: dict[str, Any], layer: dict[str, Any]) -> None:
    """Mappings merge key by key; anything else, lists included, replaces what was there."""
    for key, value in layer.items():
        below = into.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            _merge(below, value)
        else:
            into[key] = value


def _message(detail: ErrorDetails, layered: _Layered, recipe: Path) -> str:
    """One line for one mistake: where it stands, the field, what was found, what is allowed."""
    written = tuple(map(str, detail["loc"]))
    path, section, info = _resolve(written)
    place = layered.origin(path) or str(recipe)
    name = ".".join(path) or "recipe"
    if detail["type"] == "extra_forbidden":
        return f"{place}: {name}: no such field; {_suggest(path, section)}"
    rule = allowed(info) if info else "a mapping of fields"
    if detail["type"] == "missing" and path == written:
        return f"{place}: {name}: missing; allowed: {rule}"
    if detail["type"] == "value_error":
        return f"{place}: {name}: {detail['ctx']['error']}"
    found: Any = layered.values
    for key in path:
        found = found[key]
    return f"{place}: {name}: found {_found(found)}; allowed: {rule}"


def _resolve(written: FieldPath) -> tuple[FieldPath, type[BaseModel], Any]:
    """A pydantic location without its insides: the field, its section, its description.

    Within a field, pydantic appends which member of a union or which item of a list it means; the
    field as a whole is what the user wrote and what `allowed` describes.
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
    wrong = path[-1]
    near = difflib.get_close_matches(wrong, section.model_fields, n=1)
    if near:
        return f"did you mean {'.'.join([*path[:-1], near[0]])}?"
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
    return "nothing (null)" if value is None else json.dumps(value, ensure_ascii=False)
