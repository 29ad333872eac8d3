"""The preflight: every rank looks at itself, all look at what lies between them, rank 0 says what was found.

One small record goes from each rank to rank 0. There is one row per check in the table, with the nodes that
differ by name and the others by number, so that a thousand nodes take as many lines as one.
"""

import os
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer import RecipeError, RunError
from trainer.cluster.checks import (
    Finding,
    Verdict,
    attempt,
    gpus_seen,
    gpus_told,
    judge_gpu_count,
    look,
    node_name,
    stuck,
    within,
)
from trainer.cluster.exchange import (
    ANSWER,
    FOLDER_PATIENCE,
    REDUCE_PATIENCE,
    Exchange,
    Sum,
    compare_clocks,
    judge_sums,
    reduce_over_all,
    see_folder,
    share_folder,
    tell_time,
)
from trainer.engine.engine import connect, disconnect
from trainer.environment import Environment, find_environment
from trainer.recipe.file import load_recipe
from trainer.recipe.schema import Recipe
from trainer.run_folder import RunFolder

CHECKS = (
    "ranks", "recipe", "GPU count", "GPU health", "GPU memory", "driver", "NVDEC", "memory", "disk",
    "temporary disk", "/dev/shm", "shared folder", "manifests", "clock", "all-reduce", "versions",
)  # fmt: skip
"""In the order of the table."""

GREETING = 60.0  # seconds: all ranks have met already
REPORTS = 300.0  # seconds that others may take longer than rank 0 to look at themselves
WHOLE = 1200.0  # seconds after which a rank gives up waiting for rank 0
AT_FOLDER = 2 * FOLDER_PATIENCE  # seconds that a node has for the shared folder, hanging calls included
WRITING = 30.0  # seconds to write down what failed
NAMED = 4  # nodes that a line names
UNKNOWN = "?"  # the node of a rank that never said a word
LINES = 5  # of a check, with their nodes

ByNode = dict[str, Finding]

_COLOURS = {
    Verdict.NOT_APPLICABLE: "dim",
    Verdict.OK: "green",
    Verdict.WARNING: "yellow",
    Verdict.FAILED: "bold red",
}


@dataclass(frozen=True)
class Request:
    """What the user asks for.

    folder: of the run; None is what the recipe names. gpus_per_node: that there must be; None goes by the
    ranks. min_bandwidth: GB/s. patience: minutes that a rank waits for the others to come.
    """

    folder: Path | None
    recipe: Path | None
    overrides: Sequence[str]
    gpus_per_node: int | None
    min_bandwidth: float | None
    patience: float


def preflight(request: Request) -> int:
    """Examine the nodes of this job, or this machine; returns the exit code: 1 when something failed.

    Raises UserError for a mistake of the user's: on rank 0, where all have come together.
    """
    recipe, mistake = _load(request)
    device = _device(recipe)
    place = find_environment("cpu")
    if mistake and place.world_size == 1:
        raise RecipeError(mistake)
    # Gloo only has to be there: what is told goes through the store. A full mesh would have each rank
    # connect to all others.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    folder = _folder(request, recipe)
    try:
        connect(place, rendezvous=request.patience)
    except RunError as error:
        return _unmet(place, folder, str(error))
    try:
        code = Examination(request, recipe, mistake, place, device, folder).run()
    except (dist.DistError, TimeoutError) as error:
        print(f"error on rank {place.rank}: rank 0 is gone: {error}", file=sys.stderr)
        code = 1
    finally:
        if not stuck():
            disconnect()
    if stuck():  # the interpreter's end would wait for what hangs
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _load(request: Request) -> tuple[Recipe | None, str]:
    """The recipe, or what is wrong with it: other nodes may see another file."""
    if request.recipe is None:
        return None, ""
    try:
        return load_recipe(request.recipe, request.overrides), ""
    except RecipeError as error:
        return None, str(error)


def _device(recipe: Recipe | None) -> torch.device:
    """What this rank is to compute on; the CPU where its GPU is missing, which the count shows."""
    try:
        # In a copy: the variables that are set would hide who started this process.
        return find_environment(recipe.engine.device if recipe else "auto", dict(os.environ)).device
    except RunError:
        return torch.device("cpu")


def _folder(request: Request, recipe: Recipe | None) -> Path:
    if request.folder is not None:
        return request.folder
    return recipe.run.dir / recipe.name if recipe else Path("runs")


def _unmet(place: Environment, folder: Path, reason: str) -> int:
    who = "" if place.is_main else f" on rank {place.rank}"
    print(f"error{who}: {reason}", file=sys.stderr)
    if place.is_main:
        write_failures(folder, {}, everywhere=[f"ranks: {reason}"])
    return 1


class Examination:
    """One rank's part."""

    def __init__(
        self,
        request: Request,
        recipe: Recipe | None,
        mistake: str,
        place: Environment,
        device: torch.device,
        folder: Path,
    ) -> None:
        self.request = request
        self.recipe = recipe
        self.mistake = mistake
        self.place = place
        self.device = device
        self.folder = folder
        self.exchange = Exchange(place.rank, place.world_size)

    def run(self) -> int:
        self.exchange.give("hello", {"node": node_name(self.place), "first": self.place.local_rank == 0})
        return self._lead() if self.place.is_main else self._follow()

    def _follow(self) -> int:
        if self.exchange.hear("start", WHOLE)["mistake"]:
            return 2
        self.exchange.give("report", self._report())
        if self.place.rank in self.exchange.hear("late", WHOLE):
            return 1
        if self.place.local_rank == 0:
            told = self.exchange.hear("folder", WHOLE)
            with suppress(TimeoutError):  # rank 0 sees that there is no answer
                within(AT_FOLDER, lambda: see_folder(self.exchange, told, self.folder), "shared folder")
            with suppress(TimeoutError):
                tell_time(self.exchange, WHOLE)
        device = self.exchange.hear("reduce", WHOLE)
        if device is not None:
            self.exchange.give("sums", self._sums(device))
        return 0

    def _lead(self) -> int:
        world = range(self.place.world_size)
        hellos = self.exchange.collect("hello", world, GREETING)
        nodes = {rank: str(hello["node"]) for rank, hello in hellos.items()}
        self.exchange.tell("start", {"mistake": self.mistake})
        if self.mistake:
            raise RecipeError(self.mistake)
        self.exchange.give("report", self._report())
        reports = self.exchange.collect("report", nodes, REPORTS)
        self.exchange.tell("late", [rank for rank in world if rank not in reports])
        found = [*_answers(nodes, reports.keys(), self.place.world_size)]
        found += count_gpus(
            nodes,
            reports,
            device=self.recipe.engine.device if self.recipe else "auto",
            alone=self.place.launcher == "alone",
            asked=self.request.gpus_per_node,
        )
        for rank, report in reports.items():
            found += ((nodes[rank], finding_of(values)) for values in report["findings"])
        for check in ("driver", "manifests", "versions"):
            found += differing(
                check,
                {
                    nodes[rank]: report["facts"].get(check, {})
                    for rank, report in reports.items()
                    if hellos[rank]["first"]
                },
            )
        others = [rank for rank in reports if rank > 0 and hellos[rank]["first"]]
        for by_rank in (self._share(others), compare_clocks(self.exchange, others, AT_FOLDER + ANSWER)):
            found += ((nodes[rank], finding) for rank, finding in by_rank.items())
        found += self._reduce(nodes, reports)
        table = merged(found)
        self._show(table, f"{counted(len(set(nodes.values())), 'node')}, {counted(len(nodes), 'rank')}")
        return 1 if worst(table) is Verdict.FAILED else 0

    def _show(self, table: Mapping[str, ByNode], whose: str) -> None:
        console = Console(highlight=False)
        with console.capture() as capture:
            console.print(as_table(table))
        written = None
        with suppress(TimeoutError):  # a folder that hangs has its row
            written = within(WRITING, lambda: write_failures(self.folder, table), "preflight.json")
        last = summary(table, written)
        shown = [line.rstrip() for line in capture.get().splitlines()]  # a log needs no blanks at its margin
        print(f"preflight of {whose}", "", *shown, "", last, sep="\n", flush=True)

    def _report(self) -> dict[str, Any]:
        findings, facts = look(self.place, self.device, self.folder, self.recipe)
        if self.mistake:
            advice = "does this node see the same files as the others, at the same path?"
            findings.append(Finding("recipe", Verdict.FAILED, self.mistake, advice))
        elif self.place.local_rank == 0:
            name, verdict = (
                (self.recipe.name, Verdict.OK) if self.recipe else ("none named", Verdict.NOT_APPLICABLE)
            )
            findings.append(Finding("recipe", verdict, name))
        seen: dict[str, Any] = {"gpus": [], "told": 0}

        def count() -> Iterator[Finding]:
            seen["gpus"] = gpus_seen()
            seen["told"] = gpus_told() if self.place.local_rank == 0 else 0
            yield from ()

        findings += attempt("GPU count", count)
        told = [asdict(finding) for finding in findings]
        return {"findings": told, "facts": facts, "device": self.device.type, **seen}

    def _share(self, others: Sequence[int]) -> dict[int, Finding]:
        try:
            return within(
                AT_FOLDER + FOLDER_PATIENCE,
                lambda: share_folder(self.exchange, self.folder, others),
                "shared folder",
            )
        except TimeoutError:
            text = f"{self.folder} does not answer"
            return {0: Finding("shared folder", Verdict.FAILED, text, "see the file system's server")}

    def _reduce(self, nodes: Mapping[int, str], reports: Mapping[int, Any]) -> list[tuple[str, Finding]]:
        check, everyone = "all-reduce", dict.fromkeys(nodes.values())
        size = self.place.world_size
        kinds = {report["device"] for report in reports.values()}
        reason = ""
        if len(reports) < size:
            reason = "not tried: some rank did not answer"
        elif len(kinds) > 1:
            reason = "not tried: some rank has no GPU"
        device = kinds.pop() if size > 1 and not reason else None
        self.exchange.tell("reduce", device)
        if size == 1:
            return [(node, Finding(check, Verdict.NOT_APPLICABLE, "one rank")) for node in everyone]
        if device is None:
            return [(node, Finding(check, Verdict.WARNING, reason, "mend that first")) for node in everyone]
        self.exchange.give("sums", self._sums(device))
        answers = self.exchange.collect("sums", nodes, REDUCE_PATIENCE)
        sums = {rank: told for rank, told in answers.items() if not isinstance(told, str)}
        finding_by_rank = judge_sums(
            {rank: [Sum(**one) for one in told] for rank, told in sums.items()},
            size,
            self.request.min_bandwidth,
        )
        for rank in nodes.keys() - sums.keys():
            text = answers.get(rank, "no answer")
            finding_by_rank[rank] = Finding(check, Verdict.FAILED, text, _NETWORK)
        return [(nodes[rank], finding) for rank, finding in sorted(finding_by_rank.items())]

    def _sums(self, device: str) -> list[dict[str, Any]] | str:
        """This rank's sums, or why there are none."""
        chosen = self.device if device == "cuda" else torch.device("cpu")
        size, rank = self.place.world_size, self.place.rank
        try:
            sums = within(REDUCE_PATIENCE, lambda: reduce_over_all(chosen, size, rank), "all-reduce")
        except Exception as error:  # NCCL's and gloo's, of many kinds
            return str(error).splitlines()[0]
        return [asdict(one) for one in sums]


def _answers(nodes: Mapping[int, str], came: Collection[int], size: int) -> Iterator[tuple[str, Finding]]:
    """Whether all ranks are there, and have told what they found."""
    if len(nodes) < size:
        lost = [rank for rank in range(size) if rank not in nodes]
        text = f"rank {', '.join(map(str, lost[:NAMED]))}{', ...' * (len(lost) > NAMED)}: no answer"
        yield UNKNOWN, Finding("ranks", Verdict.FAILED, text, "see the logs of these ranks")
    for rank, node in nodes.items():
        if rank in came:
            yield node, Finding("ranks", Verdict.OK, "all came")
        else:
            advice = "see its log, and dmesg on the node"
            yield node, Finding("ranks", Verdict.FAILED, f"rank {rank}: no answer", advice)


def count_gpus(
    nodes: Mapping[int, str], reports: Mapping[int, Any], *, device: str, alone: bool, asked: int | None
) -> Iterator[tuple[str, Finding]]:
    """GPUs of each node. A rank may see its own only, or all of its node: those that differ count.

    device: of the recipe. alone: without a launcher, where one rank looks at all. asked: by the user.
    """
    # A node without any is one with a fault, where others have some.
    some = device == "cuda" or any(report["gpus"] or report["told"] for report in reports.values())
    for node in dict.fromkeys(nodes[rank] for rank in reports):
        here = [report for rank, report in reports.items() if nodes[rank] == node]
        seen = len({name for report in here for name in report["gpus"]})
        ranks = max(1, seen) if alone else len(here)
        needed = ranks if some and device != "cpu" else 0
        yield node, judge_gpu_count(seen, needed if asked is None else asked, ranks)


def finding_of(values: Mapping[str, Any]) -> Finding:
    """A finding that came as JSON."""
    return Finding(**{**values, "verdict": Verdict(values["verdict"])})


def differing(check: str, facts: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, Finding]]:
    """The nodes of which something is not what it is on most nodes; of equally many, what the first has.

    facts: by node and name.
    """
    usual: dict[str, str] = {}
    for name in dict.fromkeys(name for told in facts.values() for name in told):
        usual[name] = Counter(told.get(name, "missing") for told in facts.values()).most_common(1)[0][0]
    for node, told in facts.items():
        for name, value in usual.items():
            own = told.get(name, "missing")
            if own != value:
                text = f"{name}: {own}, elsewhere {value}"
                yield node, Finding(check, _DIFFERENT[check], text, _ADVICE[check])


_NETWORK = "see the network between the nodes: NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME, firewalls"
_DIFFERENT = {"driver": Verdict.WARNING, "manifests": Verdict.FAILED, "versions": Verdict.FAILED}
_ADVICE = {
    "driver": "NCCL between drivers of different age is little tested: ask for nodes of one kind",
    "manifests": "all nodes must read the same manifest: copy it there anew, or mount one",
    "versions": "all nodes must run the same installation: share it, or make install on each",
}


def merged(found: Iterable[tuple[str, Finding]]) -> dict[str, ByNode]:
    """By check and node, the worst finding; of several that are equally bad, with all of their words."""
    table: dict[str, ByNode] = {check: {} for check in CHECKS}
    for node, finding in found:
        table[finding.check][node] = _worse(table[finding.check].get(node), finding)
    return {check: nodes for check, nodes in table.items() if nodes}


def _worse(one: Finding | None, other: Finding) -> Finding:
    if one is None or one.verdict < other.verdict:
        return other
    if one.verdict > other.verdict:
        return one
    low = min(one, other, key=lambda finding: float("inf") if finding.value is None else finding.value)
    if one.verdict <= Verdict.OK or other.figure in one.figure:
        return low
    return replace(low, figure=f"{one.figure}; {other.figure}")


def worst(table: Mapping[str, ByNode]) -> Verdict:
    return max(
        (finding.verdict for nodes in table.values() for finding in nodes.values()), default=Verdict.OK
    )


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
    groups: dict[tuple[Verdict, str, str], list[str]] = {}
    for verdict in sorted(Verdict, reverse=True):
        same = {node: finding for node, finding in nodes.items() if finding.verdict is verdict}
        if verdict <= Verdict.OK and len({finding.figure for finding in same.values()}) > 1:
            groups[verdict, _range(same), ""] = list(same)
            continue
        for node, finding in same.items():
            groups.setdefault((verdict, finding.figure, finding.advice), []).append(node)
    bad = [group for group in groups if group[0] > Verdict.OK]
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
        if group[0] <= Verdict.OK:
            shown.append(f"{_number(groups[group], len(nodes))}{group[1]}")
    return shown


def _range(nodes: ByNode) -> str:
    """What nodes have in common that are well, but not with the same figures: no worse than the worst."""
    node, low = min(nodes.items(), key=lambda item: float("inf") if item[1].value is None else item[1].value)
    return low.verdict.words if low.value is None else f"{low.verdict.words}, at worst {low.figure} ({node})"


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
            node: f"{check}: {finding.figure}"
            for node, finding in nodes.items()
            if finding.verdict is Verdict.FAILED
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
        RunFolder.write_json(path, {"failed": failed, "everywhere": common})
    except OSError:  # the folder's own check says so
        return None
    return path


def summary(table: Mapping[str, ByNode], written: Path | None) -> str:
    """The last words."""
    verdicts = [max(finding.verdict for finding in nodes.values()) for nodes in table.values()]
    failed, warnings = verdicts.count(Verdict.FAILED), verdicts.count(Verdict.WARNING)
    said = [counted(number, what) for number, what in ((failed, "failure"), (warnings, "warning")) if number]
    if not failed:
        return f"nothing failed{f', {said[0]}' if said else ''}"
    return ", ".join(said) + (f"; see {written}" if written else "")
