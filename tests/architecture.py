"""The imports between subpackages, as a graph: for the tests, and drawn as docs/architecture.svg.

`python -m tests.architecture` draws the picture anew. It needs Graphviz (`apt install graphviz`).
"""

import ast
import subprocess
from collections.abc import Collection, Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "architecture.svg"
PACKAGES = ("launch", "trainer", "pipelines", "benchmarks", "models")
BANDS = {
    "launch": "#f3eefb",
    "trainer": "#eaf4ff",
    "pipelines": "#edf9ee",
    "benchmarks": "#fbeef1",
    "models": "#fdf3e7",
}

Graph = dict[str, set[str]]
"""Each node with the nodes that it imports."""


def modules() -> Iterator[tuple[str, Path]]:
    """Dotted names and files of all modules of the packages."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imported_modules(path: Path, known: set[str]) -> Iterator[str]:
    """Modules of this project that a file imports, at its head or inside a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else node.module


@cache
def module_imports() -> Graph:
    files = dict(modules())
    return {name: set(imported_modules(path, set(files))) - {name} for name, path in files.items()}


def node_of_modules(graph: Graph) -> dict[str, str]:
    """The node of each module: its folder. launch, benchmarks and models are one node each.

    Modules at a package's root that import none of its folders, such as the errors, are a node of their own:
    `trainer base`.
    """
    nodes = {name: _folder(name, graph) for name in graph}
    for package in ("trainer", "pipelines"):
        base = {name for name, node in nodes.items() if node == package and name != package}
        while above := {name for name in base if not graph[name] <= base | {"models"}}:
            base -= above
        nodes |= dict.fromkeys(base, f"{package} base")
    return nodes


def subpackage_imports() -> Graph:
    """The graph whose nodes are subpackages; see `node_of_modules`."""
    graph = module_imports()
    nodes = node_of_modules(graph)
    found: Graph = {node: set() for node in nodes.values()}
    for name, targets in graph.items():
        found[nodes[name]] |= {nodes[target] for target in targets} - {nodes[name]}
    return found


def _folder(module: str, modules: Collection[str]) -> str:
    """The folder of a module, dotted. launch, benchmarks and models are one node each."""
    package = module.split(".")[0]
    if package in ("launch", "benchmarks", "models"):
        return package
    is_folder = any(other.startswith(f"{module}.") for other in modules)
    return module if is_folder else module.rpartition(".")[0]


def reduced(graph: Graph) -> Graph:
    """The graph without the edges that follow from others. Raises graphlib.CycleError for a cycle."""
    reach: Graph = {}
    for node in TopologicalSorter(graph).static_order():
        reach[node] = graph[node].union(*(reach[target] for target in graph[node]))
    return {
        node: {t for t in targets if not any(t in reach[other] for other in targets)}
        for node, targets in graph.items()
    }


def as_dot() -> str:
    """The picture in Graphviz's language: a band for each package, a box for each node with its files."""
    lines = [
        "digraph imports {",
        'rankdir=TB; ranksep=0.35; nodesep=0.18; node [shape=box style="rounded,filled" fillcolor=white '
        'fontname="Helvetica" fontsize=11 margin="0.08,0.05" color="#667788"]; '
        'edge [color="#8899aa" arrowsize=0.5];',
    ]
    nodes = node_of_modules(module_imports())
    for package in PACKAGES:
        lines.append(f'subgraph "cluster_{package}" {{ style="rounded,filled"; color="{BANDS[package]}";')
        for node in sorted({node for name, node in nodes.items() if name.split(".")[0] == package}):
            files = [
                name.rsplit(".", 1)[-1] for name, other in nodes.items() if other == node and name != node
            ]
            lines.append(f'"{node}" [label=<{_label(node, files)}>];')
        lines.append("}")
    for node, targets in sorted(reduced(subpackage_imports()).items()):
        lines += [f'"{node}" -> "{target}";' for target in sorted(targets)]
    return "\n".join([*lines, "}"])


def _label(node: str, files: list[str], width: int = 34) -> str:
    """The node's name in bold, and its files in small letters below."""
    title = node.split(" ")[0].replace(".", "/") + ("" if node.endswith(" base") else "/")
    lines: list[str] = []
    for name in files:
        if lines and len(lines[-1]) + len(name) + 2 <= width:
            lines[-1] += f", {name}"
        else:
            lines.append(name)
    small = "<br/>".join(lines)
    return f'<b>{title}</b><br/><font point-size="8.5" color="#556677">{small}</font>'


def main() -> None:
    drawn = subprocess.run(["dot", "-Tsvg"], input=as_dot(), text=True, check=True, capture_output=True)
    PICTURE.write_text(drawn.stdout, encoding="utf-8")


if __name__ == "__main__":
    main()
