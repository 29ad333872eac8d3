"""What many nodes were found to be, as a table of as many lines for a thousand as for one, and written down
for the job's script.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.table import Table
from rich.text import Text

from trainer.cluster.preflight.checks import CheckResult, Status
from trainer.system.files import write_json

CHECKS = (
    "ranks", "recipe", "GPU count", "GPU health", "GPU memory", "driver", "NVDEC", "memory", "disk",
    "temporary disk", "/dev/shm", "shared folder", "manifests", "clock", "all-reduce", "versions",
)  # fmt: skip
"""In the order of the table."""

NAMED = 4  # nodes that a line names
UNKNOWN = "?"  # the node of a rank that never said a word
LINES = 5  # of a check, with their nodes

ByNode = dict[str, CheckResult]

_COLOURS = {
    Status.NOT_APPLICABLE: "dim",
    Status.OK: "green",
    Status.WARNING: "yellow",
    Status.FAILED: "bold red",
}


def merge_results(found: Iterable[tuple[str, CheckResult]]) -> dict[str, ByNode]:
    """By check and node, the worst finding; of several that are equally bad, with all of their words."""
    table: dict[str, ByNode] = {check: {} for check in CHECKS}
    for node, finding in found:
        table[finding.check][node] = _worse(table[finding.check].get(node), finding)
    return {check: nodes for check, nodes in table.items() if nodes}


def _worse(one: CheckResult | None, other: CheckResult) -> CheckResult:
    if one is None or one.verdict < other.verdict:
        return other
    if one.verdict > other.verdict:
        return one
    low = min(one, other, key=lambda finding: float("inf") if finding.value is None else finding.value)
    if one.verdict <= Status.OK or other.text in one.text:
        return low
    return replace(low, text=f"{one.text}; {other.text}")


def worst(table: Mapping[str, ByNode]) -> Status:
    return max((finding.verdict for nodes in table.values() for finding in nodes.values()), default=Status.OK)


def as_table(table: Mapping[str, ByNode]) -> Table:
    """A row per check: its worst verdict, and what was found where."""
    shown = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    shown.add_column("check", no_wrap=True)
    shown.add_column("verdict", no_wrap=True)
    shown.add_column("found")
    for check, nodes in table.items():
        verdict = max(finding.verdict for finding in nodes.values())
        shown.add_row(check, Text(verdict.words, _COLOURS[verdict]), Text("\n".join(lines(nodes))))
    return shown


def lines(nodes: ByNode) -> list[str]:
    """What was found on which nodes, the worst first: those with the same words together, with what to do."""
    groups: dict[tuple[Status, str, str], list[str]] = {}
    for verdict in sorted(Status, reverse=True):
        same = {node: finding for node, finding in nodes.items() if finding.verdict is verdict}
        if verdict <= Status.OK and len({finding.text for finding in same.values()}) > 1:
            groups[verdict, _range(same), ""] = list(same)
            continue
        for node, finding in same.items():
            groups.setdefault((verdict, finding.text, finding.advice), []).append(node)
    bad = [group for group in groups if group[0] > Status.OK]
    shown: list[str] = []
    for group in bad[:LINES]:
        shown.append(f"{named(groups[group], len(nodes))}{group[1]}")
        follows = bad[bad.index(group) + 1 : LINES]
        if group[2] and all(other[2] != group[2] for other in follows):  # said once, after the last it is for
            shown.append(f"-> {group[2]}")
    if bad[LINES:]:
        more = sum(len(groups[group]) for group in bad[LINES:])
        shown.append(f"and {counted(more, 'more node')}")
    for group in groups:
        if group[0] <= Status.OK:
            shown.append(f"{_number(groups[group], len(nodes))}{group[1]}")
    return shown


def _range(nodes: ByNode) -> str:
    """What nodes have in common that are well, but not with the same figures: no worse than the worst."""
    node, low = min(nodes.items(), key=lambda item: float("inf") if item[1].value is None else item[1].value)
    return low.verdict.words if low.value is None else f"{low.verdict.words}, at worst {low.text} ({node})"


def named(nodes: Sequence[str], of: int) -> str:
    """Some nodes by name, to stand before what they have in common; nothing where there is but one in all."""
    if of == 1:
        return ""
    more = f" and {len(nodes) - NAMED} more" if len(nodes) > NAMED else ""
    return f"{', '.join(nodes[:NAMED])}{more}: "


def _number(nodes: Sequence[str], of: int) -> str:
    if of == 1:
        return ""
    return f"{nodes[0]}: " if len(nodes) == 1 else f"{len(nodes)} nodes: "


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def write_failures(folder: Path, table: Mapping[str, ByNode], everywhere: Sequence[str] = ()) -> Path | None:
    """Write down which nodes failed, for the job's script to leave them out; remove what an earlier preflight
    wrote where none did. Returns the file, None where there is none.

    What failed on every one of several nodes is no single node's fault, and stands apart: leaving all of them
    out would leave nothing.
    """
    path = folder / "slurm" / "preflight.json"
    failed: dict[str, list[str]] = {}
    common = list(everywhere)
    for check, nodes in table.items():
        bad = {
            node: f"{check}: {finding.text}"
            for node, finding in nodes.items()
            if finding.verdict is Status.FAILED
        }
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
    except OSError:  # the folder's own check says so
        return None
    return path


def summary(table: Mapping[str, ByNode], written: Path | None) -> str:
    """The last words."""
    verdicts = [max(finding.verdict for finding in nodes.values()) for nodes in table.values()]
    failed, warnings = verdicts.count(Status.FAILED), verdicts.count(Status.WARNING)
    said = [counted(number, what) for number, what in ((failed, "failure"), (warnings, "warning")) if number]
    if not failed:
        return f"nothing failed{f', {said[0]}' if said else ''}"
    return ", ".join(said) + (f"; see {written}" if written else "")
