"""The benchmark as a picture."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

from matplotlib.figure import Figure

from pipelines.benchmark.contender import OURS
from pipelines.benchmark.report import Summary

COLOURS = ("#4c78a8", "#9d9d9d", "#c9b458", "#b279a2")  # the rivals'
OWN_COLOUR = "#e4572e"


def draw_rates(path: Path, summaries: Sequence[Summary]) -> None:
    """Write a PNG: a group of bars for each workload, a bar for each contender, a line from least to most."""
    measured = [summary for summary in summaries if not summary.problem]
    workloads = list(dict.fromkeys(summary.workload for summary in measured))
    contenders = list(dict.fromkeys(summary.contender for summary in measured))
    rivals = [contender for contender in contenders if contender != OURS]
    colours = {OURS: OWN_COLOUR} | {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(rivals)}
    width = 0.8 / max(1, len(contenders))
    figure = Figure(figsize=(max(6.0, 2.4 * len(workloads) + 1.5), 4.8), layout="constrained")
    axes = figure.add_subplot()
    for place, contender in enumerate(contenders):
        own = [summary for summary in measured if summary.contender == contender]
        x = [
            workloads.index(summary.workload) + (place - (len(contenders) - 1) / 2) * width for summary in own
        ]
        rates = [summary.rate for summary in own]
        spread = [
            [summary.rate - min(summary.rates) for summary in own],
            [max(summary.rates) - summary.rate for summary in own],
        ]
        axes.bar(x, rates, width * 0.92, color=colours[contender], label=contender)
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
    figure.legend(loc="outside lower center", ncols=len(contenders), frameon=False)
    figure.savefig(path, dpi=130)
