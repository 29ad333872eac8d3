"""Describes the schema of a recipe, for error messages and for the reference page `docs/recipes.md`.

`python -m trainer.config.reference_docs` writes the page.
"""

import ast
import dataclasses
import inspect
import json
import types
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import AfterValidator, BaseModel
from pydantic.fields import FieldInfo

from models.config import UniFormerV2Config, allowed_values
from trainer.config.schema import Recipe
from trainer.config.value_types import MIN_RATE, REGISTERED_MODEL, RUN_NAME, check_not_tiny

REFERENCE_PAGE = Path(__file__).parent.parent.parent / "docs" / "recipes.md"

_PREAMBLE = """\
# Recipes

A recipe is a YAML file with the whole configuration of a run. This page is generated from the schema:
`python -m trainer.config.reference_docs` writes it.

- `base: other.yaml` inherits from another recipe, named relative to the file that names it;
  `base: [model.yaml, data.yaml]` inherits from several, of which the later one wins. Sections are merged
  field by field; the inheriting file wins. A file that several bases share is applied once, first. Where
  two fields are two units of one quantity (`epochs` and `steps`, `warmup_epochs` and `warmup_steps`,
  `every_epochs` and `every_steps`), setting one replaces an inherited value of the other.
- `--set section.field=value` overrides one field from the command line, after all files. The value is read
  as YAML: `--set optimisation.steps=20 --set augmentation.crop_scale='[0.5, 1]'`.
- Paths are relative to the current directory, as with every command-line tool; only `base` is relative to
  its file.
- Unknown fields, duplicate keys and values of the wrong type are refused before anything starts.
- The run directory holds the resolved recipe, which is complete and can be started as it is.
"""

_NAMES: dict[Any, str] = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    Path: "a path",
    type(None): "null",
}

_MODEL_PREAMBLE = """\
### model.overrides

Fields of the model, by which each design of the paper's tables 9a to 9d, 12, 14 and 15 is a recipe
([ablations](ablations.md)). A default is that of the preset or of the form where these set one. Values that
do not fit together are refused with the field that has to change.
"""
_SET_ELSEWHERE = ("frames", "num_classes", "recomputed_blocks")  # `model.`, and `engine.`
_FORM = "of the form"
_DEFAULTS = {
    "global_layers": _FORM,
    "temporal_downsample": _FORM,
    "local_mhra": _FORM,
    "drop_path": _FORM,
    "global_drop_path": _FORM,
    "global_heads": "as `heads`",
}

_PATTERNS = {
    REGISTERED_MODEL: "`NAME` or `NAME@ALIAS`, of letters A-Z and a-z, digits, dots, underscores and hyphens",
    RUN_NAME: "of letters A-Z and a-z, digits, dots, underscores and hyphens, the first a letter or a digit",
}
"""Descriptions of the regular expressions in the schema."""


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class behind a field's annotation, `Embedded | None` included; None for a plain value."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _listed_section(annotation: Any) -> type[BaseModel] | None:
    """The section class of the items where a field may be a list of sections."""
    lists = (part for part in (annotation, *get_args(annotation)) if get_origin(part) is tuple)
    return next((section for part in lists if (section := section_of(part))), None)


def allowed(field: FieldInfo) -> str:
    """What a field may hold, such as `an integer, at least 1, or null`."""
    return _describe(field.annotation, field.metadata)


def choices(annotation: Any) -> list[str]:
    """The texts that a field may hold, where they are listed, as of `auto` or an integer."""
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return [argument for argument in arguments if isinstance(argument, str)]
    return [choice for argument in arguments for choice in choices(argument)]


def _describe(annotation: Any, metadata: list[Any]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        constraints = [
            part
            for each in arguments[1:]
            for part in (each.metadata if isinstance(each, FieldInfo) else [each])
        ]
        return _describe(arguments[0], [*constraints, *metadata])
    if origin in (Union, types.UnionType):
        # Constraints of the field apply to its values, not to null: they follow the first member.
        first, *others = arguments
        return ", or ".join([_describe(first, metadata), *(_describe(other, []) for other in others)])
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments)) if len(arguments) > 1 else str(arguments[0])
    if origin is tuple and arguments[-1] is ...:
        section = section_of(arguments[0])
        return f"a list of {{{', '.join(section.model_fields)}}}" if section else _describe(arguments[0], [])
    if origin is tuple:
        return f"a list of {len(arguments)}, each {_describe(arguments[0], [])}"
    if section_of(annotation):
        return "a section"
    name = "a mapping of names to values" if origin is dict else _NAMES[annotation]
    return ", ".join([name, *_constraints(metadata)])


def _constraints(metadata: list[Any]) -> list[str]:
    found = []
    for item in metadata:
        match item:
            case annotated_types.Ge(ge=bound):
                found.append(f"at least {_number(bound)}")
            case annotated_types.Gt(gt=bound):
                found.append(f"above {_number(bound)}")
            case annotated_types.Le(le=bound):
                found.append(f"at most {_number(bound)}")
            case annotated_types.Lt(lt=bound):
                found.append(f"below {_number(bound)}")
            case annotated_types.MinLen():
                found.append("not empty")
            case annotated_types.MaxLen(max_length=most):
                found.append(f"at most {most} characters")
            case annotated_types.MultipleOf(multiple_of=step):
                found.append(f"a multiple of {step}")
            case AfterValidator(func=check) if check is check_not_tiny:
                found.append(f"not between 0 and {_number(MIN_RATE)}")
            case _ if getattr(item, "pattern", None):
                found.append(_PATTERNS[item.pattern])
    return found


def _number(bound: Any) -> str:
    return f"{bound:g}" if isinstance(bound, float) else str(bound)


def reference() -> str:
    """The Markdown page that lists every field with what it allows, its default and its meaning."""
    top = [(name, field) for name, field in Recipe.model_fields.items() if not section_of(field.annotation)]
    parts = [_PREAMBLE, "## Top level\n", _table(top, "")]
    for name, field in Recipe.model_fields.items():
        if section := section_of(field.annotation):
            fields = list(section.model_fields.items())
            parts += [f"## {name}\n\n{inspect.getdoc(section)}\n", _table(fields, f"{name}.")]
            parts += [_MODEL_PREAMBLE, _model_table()] if name == "model" else []
    return "\n".join(parts)


def _table(fields: list[tuple[str, FieldInfo]], prefix: str) -> str:
    lines = ["| field | allowed | default | meaning |", "|---|---|---|---|"]
    for name, field in fields:
        section = section_of(field.annotation)
        meaning = field.description or (inspect.getdoc(section) if section else "") or ""
        cells = [f"`{prefix}{name}`", _table_cell(allowed(field)), _default(field), _table_cell(meaning)]
        lines.append(f"| {' | '.join(cells)} |")
        for inner, path in ((section, f"{name}."), (_listed_section(field.annotation), f"{name}[].")):
            if inner:
                lines += _table(list(inner.model_fields.items()), prefix + path).splitlines()[2:]
    return "\n".join(lines) + "\n"


def _model_table() -> str:
    lines = ["| field | allowed | default | meaning |", "|---|---|---|---|"]
    meanings = _attribute_docstrings(UniFormerV2Config)
    for field in dataclasses.fields(UniFormerV2Config):
        if field.name in _SET_ELSEWHERE:
            continue
        required = field.default is dataclasses.MISSING
        default = _DEFAULTS.get(field.name, "of the preset" if required else f"`{json.dumps(field.default)}`")
        cells = [f"`model.overrides.{field.name}`", allowed_values(field.name), default, meanings[field.name]]
        lines.append(f"| {' | '.join(map(_table_cell, cells))} |")
    return "\n".join(lines) + "\n"


def _attribute_docstrings(described: type) -> dict[str, str]:
    """The docstring below each field of a class."""
    (tree,) = ast.parse(inspect.cleandoc(inspect.getsource(described))).body
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, text in pairwise(tree.body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            assert isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant), field.target.id
            found[field.target.id] = str(text.value.value)
    return found


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    return f"`{value if isinstance(value, str | Path) else json.dumps(value)}`"


def _table_cell(text: str) -> str:
    """On one line, with vertical bars escaped: line breaks and bars would end the row or cell."""
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    REFERENCE_PAGE.write_text(reference(), encoding="utf-8")
