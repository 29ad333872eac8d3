"""Reads YAML files that hold one section and are no recipes, such as chains and ablations."""

import difflib
import json
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from trainer.config.schema import Recipe
from trainer.config.section import Section
from trainer.config.text_file import read_text
from trainer.config.yaml import MAX_TEXT, YamlDocument, format_path, format_text, parse_yaml
from trainer.errors import RecipeError

T = TypeVar("T", bound=Section)

_OF_RECIPES = {"base", *Recipe.model_fields} - {"name"}


def read_section_file(file: Path, described: type[T], kind: str) -> T:
    """The section that a file holds.

    kind: what such a file is, with its article, for messages: `a chain`. Raises RecipeError with a line for
    each mistake: file and line, field, what is wrong.
    """
    name = format_text(str(file))
    try:
        document = parse_yaml(read_text(file, most=MAX_TEXT), name)
    except OSError as error:
        raise RecipeError(f"cannot read {kind} from {name}: {error.strerror or error}") from error
    except ValueError as error:
        raise RecipeError(f"cannot read {kind} from {name}: {error}") from error
    if not isinstance(document.value, dict):
        fields = ", ".join(f"`{field}`" for field in described.model_fields)
        empty = "it is empty; " if document.value is None else ""
        raise RecipeError(f"{name}: {empty}{kind} is a mapping of {fields}")
    given = document.value.keys()
    if given & _OF_RECIPES and not given & described.model_fields.keys() - {"name"}:
        raise RecipeError(
            f"{name}: this is a recipe and not {kind}; name {kind}, or train this with uniformerv2 train "
            f"--recipe {name}"
        )
    try:
        return described.model_validate_json(json.dumps(document.value), strict=True)
    except ValidationError as error:
        lines = []
        for detail in error.errors():
            keys = tuple(map(str, detail["loc"]))
            lines.append(f"{name}:{_line(document, keys)}: {format_path(keys)}: {_text(detail)}")
        raise RecipeError("\n".join(lines)) from None


_TEXTS = {
    "missing": "missing",
    "extra_forbidden": "no such field",
    "tuple_type": "a list is needed",
    "dict_type": "a mapping is needed",
    "model_type": "a mapping is needed",
    "string_type": "a text is needed",
}


def _text(detail: ErrorDetails) -> str:
    """What is wrong, in the words that recipes have for it."""
    return _TEXTS.get(detail["type"], detail["msg"])


def find_section_file(given: Path, folder: Path, kind: str) -> Path:
    """A file that is given as a path, or by its name in `folder`. Raises RecipeError with the names there."""
    if given.is_file() or given.suffix:
        return given
    named = folder / f"{given}.yaml"
    if named.is_file():
        return named
    known = sorted(file.stem for file in folder.glob("[!_]*.yaml"))
    near = difflib.get_close_matches(str(given)[:100], known, n=1)
    hint = f"did you mean {near[0]}? There are" if near else "there are"
    raise RecipeError(f"there is no {kind} {format_text(str(given))}; {hint}: {', '.join(known)}")


def _line(document: YamlDocument, keys: tuple[str, ...]) -> int:
    """The line of the closest field around a mistake."""
    around = (keys[:length] for length in range(len(keys), 0, -1))
    return next((document.lines[part] for part in around if part in document.lines), 1)
