"""What the benchmark found: in the terminal, for documents, for programs."""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import platform, python_version
from statistics import median

from rich.table import Table

from pipelines.benchmark.measure import LoaderMeasurement
from pipelines.benchmark.task import THIS_LOADER
from pipelines.benchmark.workload import NO_POLICY, Workload

TABLE_COLUMNS = (
    "workload", "contender", "clips/s", "least-most", "times ours", "cores busy", "CPU ms/clip", "of which",
)  # fmt: skip
INTERFERENCE_THRESHOLD = 0.05  # cores
CSV_COLUMNS = (
    "videos", "frames", "rand_augment", "contender", "round", "clips", "seconds", "cpu_seconds",
    "others_cpu_seconds", "problem",
)  # fmt: skip
DISTRIBUTIONS = ("nvidia-dali-cuda120", "torch", "torchvision", "av", "decord2", "torchcodec", "numpy")


@dataclass(frozen=True)
class LoaderSummary:
    """A contender on a workload over all rounds.

    rates: clips per second of each round. busy: how many cores it kept busy, median; fewer than there are say
    that it waited, or that others were at work. stages: median CPU milliseconds a clip, by name. problem: why
    there are no figures; empty where there are.
    """

    workload: Workload
    loader: str
    rates: tuple[float, ...]
    busy: float
    stages: dict[str, float]
    problem: str

    @property
    def rate(self) -> float:
        return median(self.rates)

    @property
    def cpu(self) -> float:
        """CPU milliseconds a clip, of everything."""
        return sum(self.stages.values())


def summarise(measurements: Iterable[LoaderMeasurement]) -> list[LoaderSummary]:
    """One summary for each workload and contender, in the order in which they first come.

    A contender with a problem has a single one, at the workload where it showed.
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
    """The cells below HEADER."""
    ours = {s.workload: s.rate for s in summaries if s.loader == THIS_LOADER and not s.problem}
    cells = []
    for summary in summaries:
        start = (str(summary.workload), summary.loader)
        if summary.problem:
            cells.append((*start, *["-"] * 5, summary.problem))
            continue
        share = f"{summary.rate / ours[summary.workload]:.2f}" if summary.workload in ours else "-"
        spread = f"{min(summary.rates):.1f}-{max(summary.rates):.1f}"
        parts = ", ".join(f"{name} {cpu:.1f}" for name, cpu in summary.stages.items())
        figures = (f"{summary.rate:.1f}", spread, share, f"{summary.busy:.2f}", f"{summary.cpu:.1f}")
        cells.append((*start, *figures, parts))
    return cells


def format_table(summaries: Sequence[LoaderSummary]) -> Table:
    """One section per workload."""
    table = Table(*TABLE_COLUMNS[:2], title="training clips made per second, median of the rounds")
    for name in TABLE_COLUMNS[2:-1]:
        table.add_column(name, justify="right")
    table.add_column(TABLE_COLUMNS[-1])
    shown = None
    for workload, *cells in table_rows(summaries):
        if shown not in (None, workload):
            table.add_section()
        table.add_row("" if shown == workload else workload, *cells)
        shown = workload
    return table


def interference_warning(measurements: Iterable[LoaderMeasurement]) -> str:
    """A warning where other programs took more than a twentieth of a core; empty where none did."""
    shares = [one.result.others / one.result.seconds for one in measurements if one.result.seconds]
    if max(shares, default=0.0) < INTERFERENCE_THRESHOLD:
        return ""
    return (
        f"Other programs kept {min(shares):.2f} to {max(shares):.2f} of the cores busy meanwhile: "
        "compare CPU ms/clip, and measure again on a quiet machine for clips/s."
    )


def write_report(folder: Path, measurements: Sequence[LoaderMeasurement], cores: int, seconds: float) -> None:
    """What was measured on so many `cores`, for so many `seconds` each time.

    Writes `results.json` (everything), `results.csv` (a line per measurement) and `results.md` (the table).
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
    """The table as Markdown, under a line on what it was measured with."""
    cells = [TABLE_COLUMNS, *table_rows(summaries)]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in cells]
    lines.insert(1, "|---|---|---:|---:|---:|---:|---:|---|")
    installed = ", ".join(f"{name} {number}" for name, number in versions().items())
    with_what = f"{about['cores']} cores of {about['processor']}; {about['seconds']:g} s each; {installed}."
    return "\n".join([with_what, "", *lines, ""])


def versions() -> dict[str, str]:
    """Python, the system, and the libraries that take part."""
    found = {"Python": python_version(), "system": platform(terse=True)}
    for name in DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def processor() -> str:
    """The processor's name, as the system gives it."""
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "an unnamed processor"
