"""The preflight: every rank checks its own machine, and rank 0 collects and prints the results."""

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from pipelines.formatting import format_count
from trainer.cluster.preflight import control_channel as between
from trainer.cluster.preflight import report as reporting
from trainer.cluster.preflight.checks import CheckResult, Status, check_node, judge_gpu_count
from trainer.cluster.preflight.control_channel import ALL_REDUCE_TIMEOUT, FOLDER_TIMEOUT, ControlChannel
from trainer.config.load import load_recipe
from trainer.config.schema import Recipe
from trainer.distributed.environment import Environment, find_environment
from trainer.engine.process_group import connect, disconnect
from trainer.errors import RunError
from trainer.system.timeouts import has_hung_threads, run_with_timeout

REPORT_TIMEOUT = 300.0  # seconds that another rank's checks may take longer than rank 0's
RANK_0_TIMEOUT = 1200.0  # seconds after which a rank gives up waiting for rank 0

_ADVICE = {
    "manifests": "all nodes must read the same manifest: copy it there again, or mount one",
    "versions": "all nodes must run the same installation: share it, or make install on each",
}


@dataclass(frozen=True)
class PreflightRequest:
    """The options of the command."""

    folder: Path | None
    """the run directory; None for the recipe's"""
    recipe: Path | None
    overrides: Sequence[str]
    gpus_per_node: int | None
    """None for one per rank"""
    min_bandwidth: float | None
    """in GB/s"""
    patience: float
    """in minutes"""


def preflight(request: PreflightRequest) -> int:
    """Check the nodes of this job, or this machine; returns the exit code: 1 when a check failed.

    Raises RecipeError.
    """
    recipe = None if request.recipe is None else load_recipe(request.recipe, request.overrides)
    try:
        # In a copy: the variables that are set would hide the launcher.
        device = find_environment(recipe.engine.device if recipe else "auto", dict(os.environ)).device
    except RunError:  # a missing GPU, which the count reports
        device = torch.device("cpu")
    place = find_environment("cpu")
    folder = request.folder or (recipe.run.dir / recipe.name if recipe else Path("runs"))
    # Without this, gloo would connect each rank to all others.
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")
    try:
        connect(place, rendezvous=request.patience)
    except RunError as error:
        print(f"error{'' if place.is_main else f' on rank {place.rank}'}: {error}", file=sys.stderr)
        if place.is_main:
            reporting.write_failures(folder, {}, everywhere=[f"ranks: {error}"])
        return 1
    try:
        return Preflight(request, recipe, place, device, folder, ControlChannel(place.rank)).run()
    except (dist.DistError, TimeoutError) as error:
        print(f"error on rank {place.rank}: rank 0 is gone: {error}", file=sys.stderr)
        return 1
    finally:
        if not has_hung_threads():
            disconnect()


@dataclass(frozen=True)
class Preflight:
    """The preflight on one rank."""

    request: PreflightRequest
    recipe: Recipe | None
    place: Environment
    device: torch.device
    folder: Path
    channel: ControlChannel

    def run(self) -> int:
        """Returns the exit code."""
        self.channel.send("report", self._report())
        return self._lead() if self.place.is_main else self._follow()

    def _follow(self) -> int:
        if self.place.local_rank == 0:
            request = self.channel.receive("folder", RANK_0_TIMEOUT)
            work = partial(between.answer_folder_check, self.channel, request, self.folder)
            with suppress(TimeoutError):  # rank 0 reports that there is no answer
                run_with_timeout(2 * FOLDER_TIMEOUT, work, "shared folder")
        device = self.channel.receive("all-reduce", RANK_0_TIMEOUT)
        if device is not None:
            self.channel.send("measured", self._measure(device))
        return 0

    def _lead(self) -> int:
        size = self.place.world_size
        reports = self.channel.collect("report", range(size), REPORT_TIMEOUT)
        nodes = dict(enumerate(self.place.nodes or [reporting.UNKNOWN] * size))
        nodes |= {rank: report["node"] for rank, report in reports.items()}
        results = list(self._judge(nodes, reports))
        first = [rank for rank, report in reports.items() if report["facts"]]
        for by_rank in (self._check_folder([rank for rank in first if rank > 0]), self._all_reduce(reports)):
            results += ((nodes[rank], result) for rank, result in by_rank.items())
        table = reporting.merge_results(results)
        written = None if has_hung_threads() else reporting.write_failures(self.folder, table)
        statuses = [reporting.worst(nodes) for nodes in table.values()]
        failures, warnings = statuses.count(Status.FAILED), statuses.count(Status.WARNING)
        console = Console(highlight=False)
        machines = format_count(len(set(nodes.values())), "node")
        console.print(f"preflight of {machines}, {format_count(size, 'rank')}\n")
        console.print(reporting.format_table(table))
        summary = f"{format_count(failures, 'failure')}, {format_count(warnings, 'warning')}"
        console.print(f"\n{summary}{f'; see {written}' if written else ''}", soft_wrap=True)
        return 1 if failures else 0

    def _judge(
        self, nodes: Mapping[int, str], reports: Mapping[int, Any]
    ) -> Iterator[tuple[str, CheckResult]]:
        """The results of each node, from the reports of the ranks."""
        for rank, node in nodes.items():
            text, advice = f"rank {rank}: no answer", "see its log, and dmesg on the node"
            result = CheckResult("ranks", Status.FAILED, text, advice)
            yield node, CheckResult("ranks", Status.OK, "all answered") if rank in reports else result
        for rank, report in reports.items():
            for values in report["results"]:
                yield nodes[rank], CheckResult(**{**values, "status": Status(values["status"])})
        yield from check_gpu_counts(
            nodes, reports, device=self.recipe.engine.device if self.recipe else "auto",
            alone=self.place.launcher == "alone", required=self.request.gpus_per_node,
        )  # fmt: skip
        facts = {nodes[rank]: report["facts"] for rank, report in reports.items() if report["facts"]}
        for check in _ADVICE:
            yield from compare_facts(check, {node: own.get(check, {}) for node, own in facts.items()})

    def _report(self) -> dict[str, Any]:
        """What this rank sends to rank 0."""
        results, facts = check_node(self.place, self.device, self.folder, self.recipe)
        gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return {
            "node": self.place.node,
            "device": self.device.type,
            "gpus": [str(gpu.uuid) for gpu in gpus],
            "facts": facts,
            "results": [asdict(result) for result in results],
        }

    def _check_folder(self, others: Sequence[int]) -> dict[int, CheckResult]:
        work = partial(between.check_shared_folder, self.channel, self.folder, others)
        try:
            return run_with_timeout(3 * FOLDER_TIMEOUT, work, "shared folder")
        except TimeoutError:
            return {0: CheckResult("shared folder", Status.FAILED, "no answer", "see the file server")}

    def _all_reduce(self, reports: Mapping[int, Any]) -> dict[int, CheckResult]:
        ranks = range(self.place.world_size)
        kinds = {report["device"] for report in reports.values()}
        problem = "not tried: some rank has no GPU" if len(kinds) > 1 else ""
        if len(reports) < len(ranks):
            problem = "not tried: some rank did not answer"
        device = kinds.pop() if len(ranks) > 1 and not problem else None
        self.channel.broadcast("all-reduce", device)
        if device is None:
            status, text = (Status.WARNING, problem) if problem else (Status.SKIPPED, "one rank")
            return dict.fromkeys(ranks, CheckResult("all-reduce", status, text))
        self.channel.send("measured", self._measure(device))
        answers = self.channel.collect("measured", ranks, ALL_REDUCE_TIMEOUT)
        return between.judge_all_reduce(answers, device, len(ranks), self.request.min_bandwidth)

    def _measure(self, device: str) -> tuple[float, int] | str:
        """The measurement of this rank, or its error."""
        chosen = self.device if device == "cuda" else torch.device("cpu")
        work = partial(between.measure_all_reduce, chosen, self.place.world_size, self.place.rank)
        try:
            return run_with_timeout(ALL_REDUCE_TIMEOUT, work, "all-reduce")
        except Exception as error:  # of NCCL and gloo, of many kinds
            return str(error).splitlines()[0]


def check_gpu_counts(
    nodes: Mapping[int, str], reports: Mapping[int, Any], *, device: str, alone: bool, required: int | None
) -> Iterator[tuple[str, CheckResult]]:
    """The number of GPUs on each node, of which a rank's report may list its own, or all.

    device: `engine.device`. alone: without a launcher, one rank has all GPUs. required: by the user.
    """
    # A node without GPUs is faulty where others have some.
    needs_gpus = device == "cuda" or (device == "auto" and any(report["gpus"] for report in reports.values()))
    for node in dict.fromkeys(nodes[rank] for rank in reports):
        here = [report for rank, report in reports.items() if nodes[rank] == node]
        seen = len({name for report in here for name in report["gpus"]})
        ranks = max(1, seen) if alone else len(here)
        yield node, judge_gpu_count(seen, ranks * needs_gpus if required is None else required, ranks)


def compare_facts(check: str, facts: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, CheckResult]]:
    """A failure for each node and fact that differs from most nodes. facts: by node and name."""
    for name in dict.fromkeys(name for values in facts.values() for name in values):
        usual = Counter(values.get(name, "missing") for values in facts.values()).most_common(1)[0][0]
        for node, values in facts.items():
            if (own := values.get(name, "missing")) != usual:
                text = f"{name}: {own}, elsewhere {usual}"
                yield node, CheckResult(check, Status.FAILED, text, _ADVICE[check])
