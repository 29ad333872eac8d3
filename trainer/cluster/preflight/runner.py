"""The preflight: every rank looks at itself, all look at what lies between them, rank 0 says what was found.

One small record goes from each rank to rank 0. There is one row per check in the table, with the nodes that
differ by name and the others by number, so that a thousand nodes take as many lines as one.
"""

import os
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from trainer.cluster.preflight.checks import (
    CheckResult,
    Status,
    check_node,
    gpus_seen,
    gpus_told,
    judge_gpu_count,
    run_check,
)
from trainer.cluster.preflight.control_channel import (
    ANSWER,
    FOLDER_PATIENCE,
    REDUCE_PATIENCE,
    AllReduceTiming,
    ControlChannel,
    answer_folder_check,
    check_shared_folder,
    compare_clocks,
    judge_all_reduce,
    tell_time,
    time_all_reduce,
)
from trainer.cluster.preflight.report import (
    NAMED,
    UNKNOWN,
    ByNode,
    as_table,
    counted,
    merge_results,
    summary,
    worst,
    write_failures,
)
from trainer.config.load import load_recipe
from trainer.config.schema import Recipe
from trainer.distributed.environment import Environment, find_environment
from trainer.engine.process_group import connect, disconnect
from trainer.errors import RecipeError, RunError
from trainer.system.timeouts import has_hung_threads, run_with_timeout

GREETING = 60.0  # seconds: all ranks have met already
REPORTS = 300.0  # seconds that others may take longer than rank 0 to look at themselves
WHOLE = 1200.0  # seconds after which a rank gives up waiting for rank 0
AT_FOLDER = 2 * FOLDER_PATIENCE  # seconds that a node has for the shared folder, hanging calls included
WRITING = 30.0  # seconds to write down what failed


@dataclass(frozen=True)
class PreflightRequest:
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


def preflight(request: PreflightRequest) -> int:
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
        code = Preflight(request, recipe, mistake, place, device, folder).run()
    except (dist.DistError, TimeoutError) as error:
        print(f"error on rank {place.rank}: rank 0 is gone: {error}", file=sys.stderr)
        code = 1
    finally:
        if not has_hung_threads():
            disconnect()
    return code


def _load(request: PreflightRequest) -> tuple[Recipe | None, str]:
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


def _folder(request: PreflightRequest, recipe: Recipe | None) -> Path:
    if request.folder is not None:
        return request.folder
    return recipe.run.dir / recipe.name if recipe else Path("runs")


def _unmet(place: Environment, folder: Path, reason: str) -> int:
    who = "" if place.is_main else f" on rank {place.rank}"
    print(f"error{who}: {reason}", file=sys.stderr)
    if place.is_main:
        write_failures(folder, {}, everywhere=[f"ranks: {reason}"])
    return 1


class Preflight:
    """One rank's part."""

    def __init__(
        self,
        request: PreflightRequest,
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
        self.exchange = ControlChannel(place.rank, place.world_size)

    def run(self) -> int:
        self.exchange.give("hello", {"node": self.place.node, "first": self.place.local_rank == 0})
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
                run_with_timeout(
                    AT_FOLDER, lambda: answer_folder_check(self.exchange, told, self.folder), "shared folder"
                )
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
            found += ((nodes[rank], parse_result(values)) for values in report["findings"])
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
        table = merge_results(found)
        self._show(table, f"{counted(len(set(nodes.values())), 'node')}, {counted(len(nodes), 'rank')}")
        return 1 if worst(table) is Status.FAILED else 0

    def _show(self, table: Mapping[str, ByNode], whose: str) -> None:
        console = Console(highlight=False)
        with console.capture() as capture:
            console.print(as_table(table))
        written = None
        with suppress(TimeoutError):  # a folder that hangs has its row
            written = run_with_timeout(WRITING, lambda: write_failures(self.folder, table), "preflight.json")
        last = summary(table, written)
        shown = [line.rstrip() for line in capture.get().splitlines()]  # a log needs no blanks at its margin
        print(f"preflight of {whose}", "", *shown, "", last, sep="\n", flush=True)

    def _report(self) -> dict[str, Any]:
        findings, facts = check_node(self.place, self.device, self.folder, self.recipe)
        if self.mistake:
            advice = "does this node see the same files as the others, at the same path?"
            findings.append(CheckResult("recipe", Status.FAILED, self.mistake, advice))
        elif self.place.local_rank == 0:
            name, verdict = (
                (self.recipe.name, Status.OK) if self.recipe else ("none named", Status.NOT_APPLICABLE)
            )
            findings.append(CheckResult("recipe", verdict, name))
        seen: dict[str, Any] = {"gpus": [], "told": 0}

        def count() -> Iterator[CheckResult]:
            seen["gpus"] = gpus_seen()
            seen["told"] = gpus_told() if self.place.local_rank == 0 else 0
            yield from ()

        findings += run_check("GPU count", count)
        told = [asdict(finding) for finding in findings]
        return {"findings": told, "facts": facts, "device": self.device.type, **seen}

    def _share(self, others: Sequence[int]) -> dict[int, CheckResult]:
        try:
            return run_with_timeout(
                AT_FOLDER + FOLDER_PATIENCE,
                lambda: check_shared_folder(self.exchange, self.folder, others),
                "shared folder",
            )
        except TimeoutError:
            text = f"{self.folder} does not answer"
            return {0: CheckResult("shared folder", Status.FAILED, text, "see the file system's server")}

    def _reduce(self, nodes: Mapping[int, str], reports: Mapping[int, Any]) -> list[tuple[str, CheckResult]]:
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
            return [(node, CheckResult(check, Status.NOT_APPLICABLE, "one rank")) for node in everyone]
        if device is None:
            return [
                (node, CheckResult(check, Status.WARNING, reason, "mend that first")) for node in everyone
            ]
        self.exchange.give("sums", self._sums(device))
        answers = self.exchange.collect("sums", nodes, REDUCE_PATIENCE)
        sums = {rank: told for rank, told in answers.items() if not isinstance(told, str)}
        finding_by_rank = judge_all_reduce(
            {rank: [AllReduceTiming(**one) for one in told] for rank, told in sums.items()},
            size,
            self.request.min_bandwidth,
        )
        for rank in nodes.keys() - sums.keys():
            text = answers.get(rank, "no answer")
            finding_by_rank[rank] = CheckResult(check, Status.FAILED, text, _NETWORK)
        return [(nodes[rank], finding) for rank, finding in sorted(finding_by_rank.items())]

    def _sums(self, device: str) -> list[dict[str, Any]] | str:
        """This rank's sums, or why there are none."""
        chosen = self.device if device == "cuda" else torch.device("cpu")
        size, rank = self.place.world_size, self.place.rank
        try:
            sums = run_with_timeout(
                REDUCE_PATIENCE, lambda: time_all_reduce(chosen, size, rank), "all-reduce"
            )
        except Exception as error:  # NCCL's and gloo's, of many kinds
            return str(error).splitlines()[0]
        return [asdict(one) for one in sums]


def _answers(nodes: Mapping[int, str], came: Collection[int], size: int) -> Iterator[tuple[str, CheckResult]]:
    """Whether all ranks are there, and have told what they found."""
    if len(nodes) < size:
        lost = [rank for rank in range(size) if rank not in nodes]
        text = f"rank {', '.join(map(str, lost[:NAMED]))}{', ...' * (len(lost) > NAMED)}: no answer"
        yield UNKNOWN, CheckResult("ranks", Status.FAILED, text, "see the logs of these ranks")
    for rank, node in nodes.items():
        if rank in came:
            yield node, CheckResult("ranks", Status.OK, "all came")
        else:
            advice = "see its log, and dmesg on the node"
            yield node, CheckResult("ranks", Status.FAILED, f"rank {rank}: no answer", advice)


def count_gpus(
    nodes: Mapping[int, str], reports: Mapping[int, Any], *, device: str, alone: bool, asked: int | None
) -> Iterator[tuple[str, CheckResult]]:
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


def parse_result(values: Mapping[str, Any]) -> CheckResult:
    """A finding that came as JSON."""
    return CheckResult(**{**values, "verdict": Status(values["verdict"])})


def differing(check: str, facts: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, CheckResult]]:
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
                yield node, CheckResult(check, _DIFFERENT[check], text, _ADVICE[check])


_NETWORK = "see the network between the nodes: NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME, firewalls"
_DIFFERENT = {"driver": Status.WARNING, "manifests": Status.FAILED, "versions": Status.FAILED}
_ADVICE = {
    "driver": "NCCL between drivers of different age is little tested: ask for nodes of one kind",
    "manifests": "all nodes must read the same manifest: copy it there anew, or mount one",
    "versions": "all nodes must run the same installation: share it, or make install on each",
}
