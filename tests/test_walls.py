"""Which package may import which, which files may import a library, and the picture of it."""

import ast
import html
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from tests.architecture import PICTURE, reduced, subpackage_imports

ROOT = Path(__file__).parent.parent
PACKAGES = ("launch", "trainer", "pipelines", "benchmarks", "models")
MAY_IMPORT = {
    "launch": {"launch", "trainer", "pipelines", "models"},
    "trainer": {"trainer", "pipelines", "benchmarks", "models"},
    "pipelines": {"pipelines"},
    "benchmarks": {"benchmarks", "models"},
    "models": {"models"},
}
KNOWN_BY = {
    "nvidia": "pipelines/",
    "deepspeed": "trainer/engine/",
    "mlflow": "trainer/tracking/",
    "threadpoolctl": "models/products.py",
    "benchmarks": ("trainer/benchmark/", "benchmarks/"),
}


def imports(path: Path) -> Iterator[str]:
    """Top-level names of everything a file imports, at its head or inside a function."""
    package = path.relative_to(ROOT).parts[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield package if node.level else (node.module or "").split(".")[0]


FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    relative = path.relative_to(ROOT)
    own = {name for name in imports(path) if name in PACKAGES}
    assert own <= MAY_IMPORT[relative.parts[0]]
    for library, files in KNOWN_BY.items():
        if library in set(imports(path)):
            assert str(relative).startswith(files), f"{relative} may not import {library}"


def test_commands_are_short() -> None:
    lengths = {
        path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in ROOT.glob("launch/**/*.py")
    }
    assert lengths
    assert max(lengths.values()) < 100, lengths


def test_no_import_is_relative() -> None:
    relative = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not relative


def test_folders_import_one_another_without_a_cycle() -> None:
    TopologicalSorter(subpackage_imports()).prepare()  # raises CycleError with the folders of the cycle


def test_the_picture_of_the_imports_is_up_to_date() -> None:
    graph = subpackage_imports()
    titles = re.findall("<title>(.*?)</title>", PICTURE.read_text(encoding="utf-8"))
    drawn = {html.unescape(title) for title in titles}
    edges = {f"{node}->{target}" for node, targets in reduced(graph).items() for target in targets}
    assert {title for title in drawn if "->" in title} == edges, "run: python -m tests.architecture"
    assert graph.keys() <= drawn
