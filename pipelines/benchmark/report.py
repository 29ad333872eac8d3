"""Results of the benchmark as a terminal table, JSON, CSV, Markdown and a bar chart."""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import platform, python_version
from statistics import median
from textwrap import fill

from matplotlib.figure import Figure
from rich.table import Table

from pipelines.benchmark.measure import LoaderMeasurement
from pipelines.benchmark.task import THIS_LOADER
from pipelines.benchmark.workload import NO_POLICY, Workload
from pipelines.formatting import format_markdown_row

TABLE_COLUMNS = (
    "workload", "loader", "clips/s", "min-max", "ratio to this loader", "cores busy", "CPU ms/clip",
    "ratio of CPU", "of which",
)  # fmt: skip
INTERFERENCE_THRESHOLD = 0.05  # cores
THIS_LOADER_COLOUR, COLOURS = "#e4572e", ("#4c78a8", "#9d9d9d", "#c9b458", "#b279a2")
CSV_COLUMNS = (
    "videos", "frames", "rand_augment", "loader", "round", "clips", "seconds", "cpu_seconds",
    "others_cpu_seconds", "problem",
)  # fmt: skip
DISTRIBUTIONS = ("nvidia-dali-cuda120", "torch", "torchvision", "av", "decord2", "torchcodec", "numpy")


@dataclass(frozen=True)
class LoaderSummary:
    """One loader on one workload over all rounds."""

    workload: Workload
    """The clips made."""
    loader: str
    """Its name."""
    rates: tuple[float, ...]
    """Clips per second of each round."""
    busy: float
    """Cores kept busy, median; less than all where the loader waits or other programs run."""
    stages: dict[str, float]
    """CPU milliseconds per clip by stage, medians."""
    problem: str
    """Why there are no figures; empty on success."""

    @property
    def rate(self) -> float:
        """Clips per second, median."""
        return median(self.rates)

    @property
    def cpu(self) -> float:
        """CPU milliseconds per clip of all stages."""
        return sum(self.stages.values())


def summarise(measurements: Iterable[LoaderMeasurement]) -> list[LoaderSummary]:
    """One summary per workload and loader, in the order of their first measurements.

    A loader with a problem has one summary, for the workload where the problem occurred.
    """
    groups: dict[tuple[Workload, str], list[LoaderMeasurement]] = {}
    for one in measurements:
        groups.setdefault((one.workload, one.loader), []).append(one)
    summaries = []
    for (workload, loader), group in groups.items():
        results = [one.result for one in group if not one.result.problem]
        problem = "" if results else group[0].result.problem
        per_clip = [result.per_clip() for result in results]
        stages = {name: median(each[name] for each in per_clip) for name in (per_clip or [{}])[0]}
        busy = median(result.cpu / result.seconds for result in results) if results else 0.0
        rates = tuple(result.rate for result in results)
        summaries.append(LoaderSummary(workload, loader, rates, busy, stages, problem))
    return summaries


def table_rows(summaries: Sequence[LoaderSummary]) -> list[tuple[str, ...]]:
    """Cells in the order of `TABLE_COLUMNS`."""
    reference = {s.workload: s for s in summaries if s.loader == THIS_LOADER and not s.problem}
    cells = []
    for summary in summaries:
        start = (str(summary.workload), summary.loader)
        if summary.problem:
            cells.append((*start, *["-"] * 6, summary.problem))
            continue
        ours = reference.get(summary.workload)
        ratio, cpu_ratio = (
            (f"{summary.rate / ours.rate:.2f}", f"{summary.cpu / ours.cpu:.2f}") if ours else ("-", "-")
        )
        spread = f"{min(summary.rates):.1f}-{max(summary.rates):.1f}"
        parts = ", ".join(f"{name} {cpu:.1f}" for name, cpu in summary.stages.items())
        figures = (
            f"{summary.rate:.1f}",
            spread,
            ratio,
            f"{summary.busy:.2f}",
            f"{summary.cpu:.1f}",
            cpu_ratio,
        )
        cells.append((*start, *figures, parts))
    return cells


def format_table(summaries: Sequence[LoaderSummary]) -> Table:
    """The table for the terminal, with one section per workload."""
    table = Table(*TABLE_COLUMNS[:2], title="training clips made per second, median of the rounds")
    for name in TABLE_COLUMNS[2:-1]:
        table.add_column(name, justify="right")
    table.add_column(TABLE_COLUMNS[-1])
    previous = None
    for workload, *cells in table_rows(summaries):
        if previous not in (None, workload):
            table.add_section()
        table.add_row("" if previous == workload else workload, *cells)
        previous = workload
    return table


def interference_warning(measurements: Iterable[LoaderMeasurement]) -> str:
    """A warning where other programs used more than `INTERFERENCE_THRESHOLD` of a core, else empty."""
    shares = [one.result.others / one.result.seconds for one in measurements if one.result.seconds]
    if max(shares, default=0.0) < INTERFERENCE_THRESHOLD:
        return ""
    return (
        f"Other programs used {min(shares):.2f} to {max(shares):.2f} cores during the measurements: "
        "compare CPU ms/clip, and measure again on an idle machine for clips/s."
    )


def write_report(folder: Path, measurements: Sequence[LoaderMeasurement], cores: int, seconds: float) -> None:
    """Write `results.json` (everything), `results.csv` (a line per measurement) and `results.md` (the table).

    cores: how many each loader used. seconds: duration of each measurement.
    """
    folder.mkdir(parents=True, exist_ok=True)
    about = {"cores": cores, "seconds": seconds, "processor": processor(), "versions": versions()}
    content = {**about, "measurements": [asdict(one) for one in measurements]}
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    with open(folder / "results.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        for one in measurements:
            work, out = one.workload, one.result
            start = (work.name, work.frames, work.rand_augment or NO_POLICY, one.loader, one.repeat)
            writer.writerow(
                (*start, out.clips, f"{out.seconds:.3f}", f"{out.cpu:.2f}", f"{out.others:.2f}", out.problem)
            )
    text = markdown(summarise(measurements), about)
    warning = interference_warning(measurements)
    (folder / "results.md").write_text(text + (f"\n{warning}\n" if warning else ""), encoding="utf-8")


def markdown(summaries: Sequence[LoaderSummary], about: dict[str, object]) -> str:
    """The table as Markdown, below a line with the machine and the versions."""
    cells = [TABLE_COLUMNS, *table_rows(summaries)]
    lines = [format_markdown_row(row) for row in cells]
    lines.insert(1, "|---|---|---:|---:|---:|---:|---:|---:|---|")
    installed = ", ".join(f"{name} {number}" for name, number in versions().items())
    setup = f"{about['cores']} cores of {about['processor']}; {about['seconds']:g} s each; {installed}."
    return "\n".join([setup, "", *lines, ""])


def versions() -> dict[str, str]:
    """Versions of Python, the system and the measured libraries."""
    found = {"Python": python_version(), "system": platform(terse=True)}
    for name in DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def processor() -> str:
    """The processor's name from /proc/cpuinfo."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "an unknown processor"


def draw_rates(path: Path, summaries: Sequence[LoaderSummary]) -> Figure:
    """Write a PNG with a group of bars per workload, a bar per loader and the range over the rounds."""
    measured = [summary for summary in summaries if not summary.problem]
    workloads = list(dict.fromkeys(summary.workload for summary in measured))
    loaders = list(dict.fromkeys(summary.loader for summary in measured))
    baselines = [loader for loader in loaders if loader != THIS_LOADER]
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(baselines)}
    width = 0.8 / max(1, len(loaders))
    figure = Figure(figsize=(max(6.0, 2.4 * len(workloads) + 1.5), 4.8), layout="constrained")
    axes = figure.add_subplot()
    for number, loader in enumerate(loaders):
        group = [summary for summary in measured if summary.loader == loader]
        offset = (number - (len(loaders) - 1) / 2) * width
        x = [workloads.index(summary.workload) + offset for summary in group]
        rates = [summary.rate for summary in group]
        low = [summary.rate - min(summary.rates) for summary in group]
        high = [max(summary.rates) - summary.rate for summary in group]
        axes.bar(x, rates, width * 0.92, color=colours.get(loader, THIS_LOADER_COLOUR), label=loader)
        axes.errorbar(x, rates, yerr=[low, high], fmt="none", ecolor="black", elinewidth=1, capsize=3)
        for position, summary in zip(x, group, strict=True):
            axes.annotate(
                f"{summary.rate:.1f}", (position, max(summary.rates)), xytext=(0, 4),
                textcoords="offset points", ha="center", fontsize=8,
            )  # fmt: skip
    axes.set_xticks(range(len(workloads)), [fill(str(workload), 26) for workload in workloads], fontsize=8)
    axes.set(ylabel="training clips per second", title="Training clips per second: median, minimum, maximum")
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    if loaders:
        figure.legend(loc="outside lower center", ncols=len(loaders), frameon=False)
    figure.savefig(path, dpi=130)
    return figure
