"""Any text or bytes load as a recipe or are refused in one message."""

from pathlib import Path

import pytest

pytest.importorskip("hypothesis", reason="part of the extra `dev`")
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.config.test_recipe import MINIMAL, RECIPES, write
from trainer.config.load import load_recipe
from trainer.config.reference_docs import section_of
from trainer.config.schema import Recipe
from trainer.config.yaml import dump_yaml, parse_yaml
from trainer.errors import RecipeError


def loads_or_is_refused(path: Path, *overrides: str) -> None:
    """The property: a recipe, or one message."""
    try:
        recipe = load_recipe(path, overrides)
    except RecipeError as error:
        assert 0 < len(str(error)) < 30_000
        return
    assert parse_yaml(recipe.to_yaml(), "again").value


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**80), 2**80),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from([1e300, -1, 0, "auto", "1e999", "010", "1:30", "=", "<<", "a\0b", "/dev/zero"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


def names_of(section: type, prefix: str = "") -> list[str]:
    found = []
    for name, field in section.model_fields.items():
        found.append(prefix + name)
        if inner := section_of(field.annotation):
            found += names_of(inner, f"{prefix}{name}.")
    return found


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_whatever_value_a_field_has(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = write(tmp_path_factory.getbasetemp() / "minimal.yaml", MINIMAL)
    name = data.draw(st.sampled_from([*names_of(Recipe), "model.overrides.depth", "model.overrides.heads"]))
    value = dump_yaml({"value": data.draw(VALUES)}).removeprefix("value:").strip()
    loads_or_is_refused(path, f"{name}={value}", data.draw(st.text(max_size=30)))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    content=st.one_of(
        st.binary(max_size=200), st.text(alphabet=" \n\t-:?,[]{}&*#!|>'\"%@`a01.~<=").map(str.encode)
    )
)
def test_whatever_bytes_come(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.yaml"
    path.write_bytes(content)
    loads_or_is_refused(path)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(data=st.data())
def test_whatever_is_changed_in_a_recipe(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = data.draw(st.sampled_from(sorted(RECIPES.glob("*.yaml"))))
    content = bytearray(source.read_bytes().replace(b"base: ", f"base: {RECIPES}/".encode()))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content)))
        end = at + data.draw(st.integers(0, 8))
        content[at:end] = data.draw(
            st.binary(max_size=4) | st.sampled_from([b"&a ", b"*a", b"!!set ", b"\n"])
        )
    path = tmp_path_factory.getbasetemp() / "changed.yaml"
    path.write_bytes(content)
    loads_or_is_refused(path)
