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

from pipelines.benchmark.contender import OURS
from pipelines.benchmark.measure import Measurement
from pipelines.benchmark.workload import NO_POLICY, Workload

HEADER = (
    "workload", "contender", "clips/s", "least-most", "times ours", "cores busy", "CPU ms/clip", "of which",
)  # fmt: skip
NOTABLE = 0.05  # cores
COLUMNS = (
    "videos", "frames", "rand_augment", "contender", "round", "clips", "seconds", "cpu_seconds",
    "others_cpu_seconds", "problem",
)  # fmt: skip
DISTRIBUTIONS = ("nvidia-dali-cuda120", "torch", "torchvision", "av", "decord2", "torchcodec", "numpy")


@dataclass(frozen=True)
class Summary:
    """A contender on a workload over all rounds.

    rates: clips per second of each round. busy: how many cores it kept busy, median; fewer than there are say
    that it waited, or that others were at work. stages: median CPU milliseconds a clip, by name. problem: why
    there are no figures; empty where there are.
    """

    workload: Workload
    contender: str
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


def summarise(measurements: Iterable[Measurement]) -> list[Summary]:
    """One summary for each workload and contender, in the order in which they first come.

    A contender with a problem has a single one, at the workload where it showed.
    """
    groups: dict[tuple[Workload, str], list[Measurement]] = {}
    for one in measurements:
        groups.setdefault((one.workload, one.contender), []).append(one)
    summaries = []
    for (workload, contender), group in groups.items():
        outcomes = [one.outcome for one in group if not one.outcome.problem]
        problem = "" if outcomes else group[0].outcome.problem
        per_clip = [outcome.per_clip() for outcome in outcomes]
        stages = {name: median(each[name] for each in per_clip) for name in (per_clip or [{}])[0]}
        busy = median(outcome.cpu / outcome.seconds for outcome in outcomes) if outcomes else 0.0
        rates = tuple(outcome.rate for outcome in outcomes)
        summaries.append(Summary(workload, contender, rates, busy, stages, problem))
    return summaries


def rows(summaries: Sequence[Summary]) -> list[tuple[str, ...]]:
    """The cells below HEADER."""
    ours = {s.workload: s.rate for s in summaries if s.contender == OURS and not s.problem}
    cells = []
    for summary in summaries:
        start = (str(summary.workload), summary.contender)
        if summary.problem:
            cells.append((*start, *["-"] * 5, summary.problem))
            continue
        share = f"{summary.rate / ours[summary.workload]:.2f}" if summary.workload in ours else "-"
        spread = f"{min(summary.rates):.1f}-{max(summary.rates):.1f}"
        parts = ", ".join(f"{name} {cpu:.1f}" for name, cpu in summary.stages.items())
        figures = (f"{summary.rate:.1f}", spread, share, f"{summary.busy:.2f}", f"{summary.cpu:.1f}")
        cells.append((*start, *figures, parts))
    return cells


def terminal_table(summaries: Sequence[Summary]) -> Table:
    """One section per workload."""
    table = Table(*HEADER[:2], title="training clips made per second, median of the rounds")
    for name in HEADER[2:-1]:
        table.add_column(name, justify="right")
    table.add_column(HEADER[-1])
    shown = None
    for workload, *cells in rows(summaries):
        if shown not in (None, workload):
            table.add_section()
        table.add_row("" if shown == workload else workload, *cells)
        shown = workload
    return table


def disturbance(measurements: Iterable[Measurement]) -> str:
    """A warning where other programs took more than a twentieth of a core; empty where none did."""
    shares = [one.outcome.others / one.outcome.seconds for one in measurements if one.outcome.seconds]
    if max(shares, default=0.0) < NOTABLE:
        return ""
    return (
        f"Other programs kept {min(shares):.2f} to {max(shares):.2f} of the cores busy meanwhile: "
        "compare CPU ms/clip, and measure again on a quiet machine for clips/s."
    )


def write_report(folder: Path, measurements: Sequence[Measurement], cores: int, seconds: float) -> None:
    """What was measured on so many `cores`, for so many `seconds` each time.

    Writes `results.json` (everything), `results.csv` (a line per measurement) and `results.md` (the table).
    """
    folder.mkdir(parents=True, exist_ok=True)
    about = {"cores": cores, "seconds": seconds, "processor": processor(), "versions": versions()}
    content = {**about, "measurements": [asdict(one) for one in measurements]}
    (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    with open(folder / "results.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for one in measurements:
            work, out = one.workload, one.outcome
            start = (work.name, work.frames, work.rand_augment or NO_POLICY, one.contender, one.repeat)
            writer.writerow(
                (*start, out.clips, f"{out.seconds:.3f}", f"{out.cpu:.2f}", f"{out.others:.2f}", out.problem)
            )
    text = markdown(summarise(measurements), about)
    warning = disturbance(measurements)
    (folder / "results.md").write_text(text + (f"\n{warning}\n" if warning else ""), encoding="utf-8")


def markdown(summaries: Sequence[Summary], about: dict[str, object]) -> str:
    """The table as Markdown, under a line on what it was measured with."""
    cells = [HEADER, *rows(summaries)]
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
