"""The results of an ablation as a table beside the paper's numbers."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from trainer.cluster.chain import is_finished
from trainer.errors import RunError
from trainer.paper.ablation import Ablation
from trainer.paper.ablation import Cell as GridCell
from trainer.system.files import write_text
from trainer.tracking.comparison.folder_source import read_folder
from trainer.tracking.comparison.mlflow_source import MlflowSource
from trainer.tracking.comparison.render import Block, Cell, Column, Heading, Paragraph, Table, as_markdown
from trainer.tracking.comparison.results import MISSING, deviation, percent
from trainer.tracking.mlflow_tracker import find_mlflow_run_id

TABLE = "table.md"
JSON = "table.json"


@dataclass(frozen=True)
class CellResult:
    """The finished trainings of a cell."""

    cell: GridCell
    top1: tuple[float, ...]
    """0..1 after the last step, of each finished seed."""
    unfinished: tuple[str, ...]
    """The states of the other seeds."""

    @property
    def mean(self) -> float | None:
        return deviation(self.top1)[0] if self.top1 else None

    @property
    def spread(self) -> float | None:
        """The sample deviation; None of a single value."""
        return deviation(self.top1)[1] if self.top1 else None


@dataclass(frozen=True)
class OrderAgreement:
    """How a column's order of rows compares with the paper's."""

    column: str
    same: int
    """Pairs of rows in the paper's order."""
    pairs: int
    """Pairs whose numbers differ in the paper and here."""
    reversed: tuple[tuple[str, str, float, float], ...]
    """The other pairs: the row that is better in the paper, the other, the paper's difference in points, and
    ours, which is negative."""


def read_results(ablation: Ablation, seeds: int, home: Path) -> list[CellResult]:
    """The results of all cells; cells of equal recipes have the same.

    Raises RecipeError where a finished training had other settings, also for its evaluation: a table compares
    equal ones.
    """
    runs: dict[str, list[Path]] = {}
    for cell, _, stage in ablation.runs(seeds, home):
        is_finished(stage, compares_views=True)  # raises
        runs.setdefault(cell.label, []).append(stage.run_dir)
    by_label = {label: _read(paths) for label, paths in runs.items()}
    return [CellResult(cell, *by_label[cell.label]) for cell in ablation.cells]


def _read(paths: Sequence[Path]) -> tuple[tuple[float, ...], tuple[str, ...]]:
    top1, unfinished = [], []
    for path in paths:
        run = read_folder(path) if path.is_dir() else None
        if run is not None and run.status == "finished" and run.last is not None:
            top1.append(run.last.top1)
        else:
            unfinished.append("not started" if run is None else run.status)
    return tuple(top1), tuple(unfinished)


def order_agreement(results: Sequence[CellResult], column: str) -> OrderAgreement:
    """Compares all pairs of a column's rows that have results and differ in the paper; each training once."""
    of_column = {each.cell.label: each for each in results if each.cell.column == column and each.top1}
    same, reversed_pairs = 0, []
    for one, other in combinations(of_column.values(), 2):
        better, worse = (one, other) if one.cell.paper >= other.cell.paper else (other, one)
        by_paper = better.cell.paper - worse.cell.paper
        ours = 100 * ((better.mean or 0) - (worse.mean or 0))
        if not by_paper or not ours:
            continue
        if ours > 0:
            same += 1
        else:
            reversed_pairs.append((better.cell.row, worse.cell.row, by_paper, ours))
    reversed_pairs.sort(key=lambda pair: pair[3])
    return OrderAgreement(column, same, same + len(reversed_pairs), tuple(reversed_pairs))


def report(ablation: Ablation, results: Sequence[CellResult]) -> list[Block]:
    """The table: a row for each design, the paper's and our top-1 for each data set."""
    columns = [Column("design", numeric=False)]
    for name in ablation.columns:
        columns += [Column(f"{name}: paper"), Column("ours"), Column("seeds")]
    found = {(each.cell.row, each.cell.column): each for each in results}
    best = {name: _best(results, name) for name in ablation.columns}
    rows = []
    for row in ablation.rows:
        cells = [Cell(row)]
        for name in ablation.columns:
            each = found.get((row, name))
            if each is None:
                cells += [Cell(MISSING), Cell(MISSING), Cell(MISSING)]
                continue
            text = _text(each)
            seeds = f"{len(each.top1)} of {len(each.top1) + len(each.unfinished)}"
            cells += [
                Cell(f"{each.cell.paper:.1f}"),
                Cell(text, best=bool(each.top1) and each.mean == best[name]),
                Cell(seeds if each.unfinished else str(len(each.top1))),
            ]
        rows.append(cells)
    blocks: list[Block] = [Heading(ablation.title), Table(columns, rows)]
    blocks += [Paragraph(note) for note in ablation.notes]
    for name in ablation.columns:
        order = order_agreement(results, name)
        if order.pairs:
            text = f"{name}: {order.same} of {order.pairs} pairs of designs are in the paper's order."
            blocks.append(Paragraph(text))
    return blocks


def _text(result: CellResult) -> str:
    if result.mean is None:
        return ", ".join(dict.fromkeys(result.unfinished)) or MISSING
    return percent(result.mean) + (f" ± {percent(result.spread)}" if result.spread is not None else "")


def _best(results: Sequence[CellResult], column: str) -> float:
    means = [each.mean for each in results if each.cell.column == column and each.mean is not None]
    return max(means, default=-math.inf)


def save_results(ablation: Ablation, seeds: int, home: Path) -> list[Block]:
    """Write the table of what is finished to `home`, and to the parent run in MLflow if there is one.

    The files are `table.md` and `table.json`, the values of all cells. Returns the blocks of the table.
    Raises RunError where they cannot be written, and RecipeError as `read_results`.
    """
    results = read_results(ablation, seeds, home)
    blocks = report(ablation, results)
    try:
        home.mkdir(parents=True, exist_ok=True)
        write_text(home / TABLE, as_markdown(blocks, ""))
        write_text(home / JSON, json.dumps([_as_json(each) for each in results], indent=1) + "\n")
    except OSError as error:
        raise RunError(f"{home}: the table cannot be written: {error.strerror or error}") from None
    tracking = ablation.cells[0].variant.recipe.tracking
    parent = find_mlflow_run_id(home)
    if tracking.enabled and parent is not None:
        source = MlflowSource(None if tracking.uri is None else str(tracking.uri))
        try:
            source.save(parent, [home / TABLE, home / JSON], "ablation")
        finally:
            source.close()
    return blocks


def _as_json(result: CellResult) -> dict[str, Any]:
    return {
        "row": result.cell.row,
        "column": result.cell.column,
        "runs": result.cell.label,
        "paper": result.cell.paper,
        "top1": list(result.top1),
        "mean": result.mean,
        "deviation": result.spread,
        "unfinished": list(result.unfinished),
    }
