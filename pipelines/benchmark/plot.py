"""The benchmark as a picture."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

from matplotlib.figure import Figure

from pipelines.benchmark.report import LoaderSummary
from pipelines.benchmark.task import THIS_LOADER

COLOURS = ("#4c78a8", "#9d9d9d", "#c9b458", "#b279a2")  # the rivals'
THIS_LOADER_COLOUR = "#e4572e"


def draw_rates(path: Path, summaries: Sequence[LoaderSummary]) -> None:
    """Write a PNG: a group of bars for each workload, a bar for each contender, a line from least to most."""
    measured = [summary for summary in summaries if not summary.problem]
    workloads = list(dict.fromkeys(summary.workload for summary in measured))
    loaders = list(dict.fromkeys(summary.loader for summary in measured))
    baselines = [loader for loader in loaders if loader != THIS_LOADER]
    colours = {THIS_LOADER: THIS_LOADER_COLOUR} | {
        name: COLOURS[i % len(COLOURS)] for i, name in enumerate(baselines)
    }
    width = 0.8 / max(1, len(loaders))
    figure = Figure(figsize=(max(6.0, 2.4 * len(workloads) + 1.5), 4.8), layout="constrained")
    axes = figure.add_subplot()
    for place, loader in enumerate(loaders):
        own = [summary for summary in measured if summary.loader == loader]
        x = [workloads.index(summary.workload) + (place - (len(loaders) - 1) / 2) * width for summary in own]
        rates = [summary.rate for summary in own]
        spread = [
            [summary.rate - min(summary.rates) for summary in own],
            [max(summary.rates) - summary.rate for summary in own],
        ]
        axes.bar(x, rates, width * 0.92, color=colours[loader], label=loader)
        axes.errorbar(x, rates, yerr=spread, fmt="none", ecolor="black", elinewidth=1, capsize=3)
        for position, summary in zip(x, own, strict=True):
            axes.annotate(
                f"{summary.rate:.1f}", (position, max(summary.rates)), xytext=(0, 4),
                textcoords="offset points", ha="center", fontsize=8,
            )  # fmt: skip
    axes.set_xticks(range(len(workloads)), [fill(str(workload), 26) for workload in workloads], fontsize=8)
    axes.set(ylabel="training clips per second", title="Clips made per second: median, least and most")
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(loaders), frameon=False)
    figure.savefig(path, dpi=130)
