"""The results of all nodes as a table, and in a file for the job's script."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.table import Table
from rich.text import Text

from pipelines.formatting import format_count, format_list
from trainer.cluster.preflight.checks import CheckResult, Status
from trainer.system.files import write_json

CHECKS = (
    "ranks", "GPU count", "GPU health", "NVDEC", "memory", "disk", "/dev/shm", "shared folder",
    "manifests", "versions", "all-reduce",
)  # fmt: skip
"""In the order of the table."""

UNKNOWN = "?"  # the node of a rank that sent nothing
_NAMED = 4  # nodes that a line names
_LINES = 5  # lines per check
_COLOURS = {Status.SKIPPED: "dim", Status.OK: "green", Status.WARNING: "yellow", Status.FAILED: "bold red"}

ByNode = dict[str, CheckResult]


def merge_results(results: Iterable[tuple[str, CheckResult]]) -> dict[str, ByNode]:
    """The worst result by check and node; equally bad ones are joined."""
    table: dict[str, ByNode] = {check: {} for check in CHECKS}
    for node, new in results:
        old = table[new.check].get(node)
        if old is None or old.status < new.status:
            table[new.check][node] = new
        elif old.status == new.status > Status.OK and new.text not in old.text:
            table[new.check][node] = replace(old, text=f"{old.text}; {new.text}")
    return {check: nodes for check, nodes in table.items() if nodes}


def worst(nodes: ByNode) -> Status:
    return max(result.status for result in nodes.values())


def format_table(table: Mapping[str, ByNode]) -> Table:
    """A row per check: its worst status, and the results by node."""
    rows = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in ("check", "status", "result"):
        rows.add_column(head, no_wrap=head != "result")
    for check, nodes in table.items():
        status = worst(nodes)
        rows.add_row(check, Text(status.name.lower(), _COLOURS[status]), Text("\n".join(format_nodes(nodes))))
    return rows


def format_nodes(nodes: ByNode) -> list[str]:
    """Nodes with equal results share a line, the worst first: a thousand nodes take a few lines."""
    groups: dict[CheckResult, list[str]] = {}
    texts = {result.text for result in nodes.values() if result.status is Status.OK}
    for node, result in sorted(nodes.items(), key=lambda item: -item[1].status):
        if result.status is Status.OK and len(texts) > 1:
            result = replace(result, text="ok")
        groups.setdefault(result, []).append(node)
    lines: list[str] = []
    for result, names in list(groups.items())[:_LINES]:
        is_fine = result.status <= Status.OK
        where = format_count(len(names), "node") if is_fine else format_list(names, _NAMED)
        lines.append(f"{where}: {result.text}" if len(nodes) > 1 else result.text)
        if result.advice and result.status > Status.OK:
            lines.append(f"-> {result.advice}")
    rest = sum(map(len, list(groups.values())[_LINES:]))
    return [*lines, f"and {format_count(rest, 'more node')}"] if rest else lines


def write_failures(folder: Path, table: Mapping[str, ByNode], everywhere: Sequence[str] = ()) -> Path | None:
    """Write which nodes failed into `slurm/preflight.json`, for the job's script to exclude them.

    Removes the file of an earlier preflight where nothing failed. Returns the file, None without one. What
    failed on all of several nodes is listed apart: excluding all nodes would leave none.
    """
    path = folder / "slurm" / "preflight.json"
    failed: dict[str, list[str]] = {}
    common = list(everywhere)
    for check, nodes in table.items():
        bad = {node: f"{check}: {one.text}" for node, one in nodes.items() if one.status is Status.FAILED}
        if UNKNOWN in bad or len(bad) == len(nodes) > 1:
            common += dict.fromkeys(bad.values())
        else:
            for node, text in bad.items():
                failed.setdefault(node, []).append(text)
    try:
        if not failed and not common:
            path.unlink(missing_ok=True)
            return None
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"failed": failed, "everywhere": common})
    except OSError:  # the check of the folder reports it
        return None
    return path
