"""The walls of the house: which package may import which, and who alone knows a library."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("launch", "trainer", "pipelines", "models")
MAY_IMPORT = {
    "launch": {"launch", "trainer", "pipelines", "models"},
    "trainer": {"trainer", "pipelines", "models"},
    "pipelines": {"pipelines"},
    "models": {"models"},
}
KNOWN_BY = {
    "nvidia": "pipelines/",
    "deepspeed": "trainer/engine/",
    "mlflow": "trainer/tracking/",
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
            assert str(relative).startswith(files), f"{relative} may not know {library}"


def test_doors_are_thin() -> None:
    lengths = {
        path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in ROOT.glob("launch/**/*.py")
    }
    assert lengths
    assert max(lengths.values()) < 100, lengths
