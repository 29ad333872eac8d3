"""Reads YAML files that hold one section and are no recipes, such as chains and ablations."""

import json
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from trainer.config.section import Section
from trainer.config.text_file import read_text
from trainer.config.yaml import MAX_TEXT, YamlDocument, format_path, format_text, parse_yaml
from trainer.errors import RecipeError

T = TypeVar("T", bound=Section)


def read_section_file(file: Path, described: type[T], kind: str) -> T:
    """The section that a file holds.

    kind: what such a file is, with its article, for messages: `a chain`. Raises RecipeError with a line for
    each mistake: file and line, field, what is wrong.
    """
    name = format_text(str(file))
    try:
        document = parse_yaml(read_text(file, most=MAX_TEXT), name)
    except (OSError, ValueError) as error:
        raise RecipeError(f"cannot read {kind} from {name}: {error}") from error
    if not isinstance(document.value, dict):
        fields = " and ".join(f"`{field}`" for field in described.model_fields)
        raise RecipeError(f"{name}: {kind} is a mapping of {fields}")
    try:
        return described.model_validate_json(json.dumps(document.value), strict=True)
    except ValidationError as error:
        lines = []
        for detail in error.errors():
            keys = tuple(map(str, detail["loc"]))
            lines.append(f"{name}:{_line(document, keys)}: {format_path(keys)}: {detail['msg']}")
        raise RecipeError("\n".join(lines)) from None


def find_section_file(given: Path, folder: Path, kind: str) -> Path:
    """A file that is given as a path, or by its name in `folder`. Raises RecipeError with the names there."""
    if given.is_file() or given.suffix:
        return given
    named = folder / f"{given}.yaml"
    if named.is_file():
        return named
    known = ", ".join(sorted(file.stem for file in folder.glob("[!_]*.yaml")))
    raise RecipeError(f"there is no {kind} {format_text(str(given))}; there are: {known}")


def _line(document: YamlDocument, keys: tuple[str, ...]) -> int:
    """The line of the closest field around a mistake."""
    around = (keys[:length] for length in range(len(keys), 0, -1))
    return next((document.lines[part] for part in around if part in document.lines), 1)
