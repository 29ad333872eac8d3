"""Reports in terminals of several widths, as Markdown, HTML and JSON; the picture."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image
from rich.console import Console

from tests.trainer.tracking.comparison.run_folders import make_run
from trainer.tracking.comparison import curves
from trainer.tracking.comparison.compare import Comparison, compare
from trainer.tracking.comparison.curves import draw_curves, smoothed
from trainer.tracking.comparison.folder_source import read_folder
from trainer.tracking.comparison.render import Cell, Column, Table, as_html, as_markdown, print_report
from trainer.tracking.comparison.report import as_json, report
from trainer.tracking.comparison.runs import ComparedRun, Curve, RecordedEvaluation

HOSTILE = 'x<script>alert(1)</script>|`&"\x1b[31m[red]$a^2$'


def of_folders(folder: Path, count: int) -> Comparison:
    long = "a_name_that_many_runs_of_a_sweep_have_in_common_"
    paths = [
        make_run(
            folder / f"{long}{number}", seed=number % 2, optimisation__learning_rate=1e-3 * (1 + number // 2),
            top1={2: 0.3, 4: 0.4 + 0.01 * number}, end="failed" if number == 1 else "end",
            scores={"labels": [0, 1, 2] * 4, "predictions": [0, 1, 2] * 3 + [number % 3] * 3},
        )
        for number in range(count)
    ]  # fmt: skip
    return compare([read_folder(path) for path in paths])


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return of_folders(tmp_path_factory.mktemp("five"), 5)


def printed(comparison: Comparison, width: int | None) -> str:
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=width is not None, color_system=None)
    print_report(report(comparison, curves=False), console)
    return re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())


@pytest.mark.parametrize("width", [80, 100, 120])
def test_a_terminals_width_is_kept(five: Comparison, width: int) -> None:
    text = printed(five, width)
    assert max(map(len, text.splitlines())) <= width
    for place, run in enumerate(five.runs, start=1):
        assert re.search(rf"^{place}  ?…?\S*{run.name[-10:]} ", text, re.M), text
    if width == 80:
        assert "No space for:" in text and "best top-5" in text
    assert "What differs in the recipes" in text and "  learning_rate" in text
    assert "0.001: " in text


def test_a_pipe_gets_everything(five: Comparison) -> None:
    text = printed(five, None)
    assert five.runs[0].name in text and "No room" not in text
    assert "\x1b" not in text
    (failed,) = [line for line in text.splitlines() if " failed " in line]
    assert re.search(
        r" failed +4 +41\.00 +41\.00 +51\.00 +51\.00 +1\.5900 +1\.8750 "
        r"+14\.0 +30\.0 +0\.01 +0\.02 +25\.0 +1$",
        failed,
    )
    assert "5 runs (4 finished, 1 failed)" in text
    assert "no room" in text  # why it failed


def test_two_runs_have_their_values_side_by_side(tmp_path: Path) -> None:
    text = printed(of_folders(tmp_path, 2), 120)
    assert re.search(r"^  seed +1 +0$", text, re.M)
    assert "Nothing but the names" not in text
    one = read_folder(next(tmp_path.iterdir()))
    assert "Nothing but the names" in printed(compare([one, one]), 80)
    assert "What differs" not in printed(compare([one]), 80)


def test_long_names_above_columns_are_folded_and_not_cut() -> None:
    names = ["quickstart", "quickstart-seed1", "quickstart_order_blind"]
    columns = [Column("field", numeric=False)]
    columns += [Column(f"{number} {name}", False, wraps=True) for number, name in enumerate(names, 1)]
    file = io.StringIO()
    rows = [[Cell(text) for text in ("  overrides.global_layers", "-", "-", "[]")]]
    print_report([Table(columns, rows)], Console(file=file, width=80, force_terminal=True, color_system=None))
    lines = re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue()).splitlines()
    assert max(map(len, lines)) <= 80
    assert names[2] in file.getvalue(), lines


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_html_is_one_file_without_a_network(five: Comparison) -> None:
    page = as_html(report(five, curves=True))
    parsed = Tags()
    parsed.feed(page)
    names = [tag for tag, _ in parsed.tags]
    assert "script" not in names and "link" not in names and "http" not in page
    (picture,) = [attributes["src"] for tag, attributes in parsed.tags if tag == "img"]
    assert picture is not None and picture.startswith("data:image/png;base64,")
    drawn = image.imread(io.BytesIO(base64.b64decode(picture.partition(",")[2])))
    assert drawn.shape[1] > 1000
    assert five.runs[0].name in parsed.text and "McNemar" in parsed.text


def test_hostile_names_are_shown_as_they_are(tmp_path: Path) -> None:
    run = read_folder(make_run(tmp_path / "run", top1={4: 0.5}))
    other = read_folder(make_run(tmp_path / "other", top1={4: 0.4}))
    run.name, run.recipe["model.form"] = HOSTILE, HOSTILE
    other.notes.append(HOSTILE)
    blocks = report(compare([run, other]), curves=True)
    page = as_html(blocks)
    assert "<script" not in page and "\x1b" not in page
    text = printed(compare([run, other]), 120)
    assert "\x1b" not in text and "[red]" in text
    markdown = as_markdown(blocks, "curves.png")
    assert "\x1b" not in markdown and not re.search(r"(?<!\\)<script", markdown)
    tables = [line for line in markdown.splitlines() if line.startswith("| ")]
    (head,) = {len(re.findall(r"(?<!\\)\|", line)) for line in tables if line.startswith(("| # |", "| 1 |"))}
    assert head > 5
    assert "![curves](curves.png)" in markdown
    assert "](my%20%28report%29.png)" in as_markdown(blocks, "my (report).png")


def test_json_has_everything_and_is_strict(five: Comparison) -> None:
    def refuse(text: str) -> None:
        raise AssertionError(text)

    found = json.loads(as_json(five), parse_constant=refuse)
    assert [run["number"] for run in found["runs"]] == [1, 2, 3, 4, 5]
    assert found["runs"][0]["results"]["best_top1"] == pytest.approx(0.44)
    assert found["runs"][0]["recipe"]["optimisation.learning_rate"] == "0.003"
    assert found["runs"][0]["data_against_baseline"] is None
    assert found["runs"][1]["test_against_baseline"]["videos"] == 12
    assert found["differences"]["seed"] == ["0", "1", "0", "1", "0"]
    (whole,) = [group for group in found["groups"] if group["finished"] == 2]
    assert whole["best_top1"] == {
        "mean": pytest.approx(0.425),
        "deviation": pytest.approx(0.00707, rel=1e-3),
        "n": 2,
    }


def synthetic(count: int, seeds: int) -> list[ComparedRun]:
    """Runs with curves in memory; `seeds` of them share a recipe."""
    runs = []
    steps = np.arange(1.0, 101.0)
    for number in range(count):
        recipe = {"seed": str(number % seeds), "lr": str(number // seeds), "optimisation.global_batch": "8"}
        run = ComparedRun(str(number), f"run {number}", "finished", recipe)
        run.evaluations = [RecordedEvaluation(step, number / count * step / 100, None) for step in (50, 100)]
        run.read_curve = lambda: Curve(steps, 1 / steps, steps / 10, steps / 5)
        runs.append(run)
    return runs


@pytest.mark.parametrize(
    ("count", "seeds", "lines", "said"),
    [
        (3, 3, 3, ""),
        (20, 5, 20, ""),
        (500, 50, 10, "of each group of seeds the mean"),
        (500, 5, 20, "of the 20 runs with the highest top-1 of 500"),
    ],
)
def test_the_picture_shows_as_many_lines_as_can_be_read(
    count: int, seeds: int, lines: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[str] = []
    monkeypatch.setattr(curves, "_draw", lambda found, _: [drawn.append(line.label) for line in found])
    comparison = compare(synthetic(count, seeds))
    result = draw_curves(comparison.runs, comparison.groups)
    assert result is not None and said in result[1]
    assert len(drawn) == lines
    if lines == count:
        assert drawn[0] == f"1 run {count - 1}"


def test_many_runs_and_gaps_are_drawn(tmp_path: Path) -> None:
    runs = compare(synthetic(40, 10)).runs
    runs[0].read_curve = lambda: None
    gaps = np.array([1.0, np.nan, 0.5])
    runs[1].read_curve = lambda: Curve(np.array([1.0, 2, 3]), gaps, np.full(3, np.nan), np.full(3, np.nan))
    runs[2].evaluations = []
    del runs[3].recipe["optimisation.global_batch"]
    for groups in (compare(runs).groups, []):
        result = draw_curves(runs, groups)
        assert result is not None
        assert image.imread(io.BytesIO(result[0])).shape[1] > 1000
    for run in runs:
        run.read_curve = lambda: None
    assert draw_curves(runs, []) is None


def test_smoothing_is_a_mean_over_neighbours() -> None:
    assert smoothed(np.array([1.0, 5.0])).tolist() == [1.0, 5.0]  # too few to smooth
    values = np.arange(200.0)
    assert smoothed(values)[100] == 100 and smoothed(values)[0] == np.mean([0, 1, 2, 3, 4, 5])
