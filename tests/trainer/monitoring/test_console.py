"""What a person sees, in a log file and in a real pseudo-terminal."""

import io
import logging
import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from trainer.monitoring.console import Display, LiveDisplay, PlainDisplay, open_display, summary_table
from trainer.monitoring.throughput import Rates
from trainer.system.formatting import format_duration

RATES = Rates(
    clips_per_second=12.34, data_wait_share=0.056, seconds_per_step=2.0, memory_peak=3 * 2**30, mfu=None
)
SUMMARY = {
    "top1": 0.9325,
    "top5": 1.0,
    "clips_per_second": 33.14,
    "data_wait_share": 0.031,
    "spent": "1:02:03: training 90 %, waiting 10 %",
    "steps": 500,
    "parameters": 114552208,
    "gmacs": 148.1,
    "videos": 400,
}


def show(display: Display, step: int, **changes: object) -> None:
    figures = {"epoch": 1.5, "loss": 2.34567, "learning_rate": 1e-3, "rates": RATES, "seconds_left": 3661.0}
    display.step(step, **(figures | changes))  # type: ignore[arg-type]


def plain(every: int = 10, total_steps: int = 25) -> tuple[Display, io.StringIO]:
    file = io.StringIO()
    display = open_display(is_main=True, total_steps=total_steps, first_step=0, every=every, file=file)
    assert isinstance(display, PlainDisplay)
    return display, file


def test_a_line_every_so_many_steps_and_for_the_first_and_the_last() -> None:
    display, file = plain()
    with display:
        for step in range(1, 26):
            show(display, step)
    assert [line.split()[1] for line in file.getvalue().splitlines()] == ["1/25", "10/25", "20/25", "25/25"]


def test_a_plain_line_says_all_and_no_escape_codes() -> None:
    display, file = plain()
    with display:
        show(display, 10)
        show(display, 20, rates=Rates(12.34, 0.056, 2.0, 3 * 2**30, mfu=0.414))
    first, second = file.getvalue().splitlines()
    assert first == (
        "step 10/25  epoch 1.50  loss 2.3457  lr 1.00e-03  12.3 clips/s  wait 6 %  3.0 GiB  1:01:01 left"
    )
    assert "  MFU 41 %  " in second
    assert "\x1b" not in file.getvalue()


def test_warnings_of_our_packages_are_shown_and_handlers_removed(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trainer.x")
    display, file = plain()
    before = logging.getLogger("trainer").handlers[:]
    with display:
        logging.getLogger("pipelines.dali.external_source").warning("%s is [bold] broken", "a.mp4")
        logging.getLogger("trainer.x").info("not shown")
    logging.getLogger("pipelines.dali.external_source").warning("after the end")
    assert file.getvalue() == "warning: a.mp4 is [bold] broken\n"
    assert logging.getLogger("trainer").handlers == before


def test_other_ranks_show_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    display = open_display(is_main=False, total_steps=10, first_step=0, every=1)
    with display:
        show(display, 1)
        display.note("a")
        display.warn("b")
        logging.getLogger("trainer").warning("c")
        display.summary(SUMMARY, Path("runs/x"), None)
    assert capfd.readouterr() == ("", "")


def text_of(
    summary: dict, run_dir: str = "runs/quickstart", command: str | None = "mlflow ui"
) -> dict[str, str]:
    console = Console(file=io.StringIO(), width=200)
    console.print(summary_table(summary, Path(run_dir), command))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return dict(re.split(r"  +", line.rstrip(), maxsplit=1) for line in lines)


def test_the_table_that_ends_a_run() -> None:
    assert text_of(SUMMARY) == {
        "top-1": "93.25 %",
        "top-5": "100.00 %",
        "clips/s": "33.1",
        "data wait": "3.1 %",
        "time": "1:02:03: training 90 %, waiting 10 %",
        "steps": "500",
        "parameters": "114,552,208",
        "cost of a view": "148.1 GMACs",
        "run": "runs/quickstart",
        "MLflow": "mlflow ui",
    }


def test_the_table_names_the_best_evaluation_and_its_file() -> None:
    best = {"best_top1": 0.96875, "best_step": 300, "best_weights": "weights-best.safetensors"}
    shown = text_of(SUMMARY | best)
    assert shown["best top-1"] == "96.88 % after step 300, in weights-best.safetensors"
    assert list(shown)[:3] == ["top-1", "top-5", "best top-1"]
    assert "not kept" in text_of(SUMMARY | best | {"best_weights": None})["best top-1"]


def test_what_was_not_measured_is_left_out() -> None:
    assert text_of({"top1": None, "steps": 3}, command=None) == {"steps": "3", "run": "runs/quickstart"}


def test_a_long_command_stays_on_one_line_to_be_copied() -> None:
    display, file = plain()
    command = "mlflow ui --backend-store-uri sqlite:////" + "long/" * 30 + "mlflow.db"
    display.summary(SUMMARY, Path("runs/x"), command)
    assert file.getvalue().splitlines()[-1] == f"MLflow          {command}"


def test_a_path_is_no_markup() -> None:
    display, file = plain()
    display.summary(SUMMARY, Path("runs/[/b] [red]x :smile:"), None)
    assert file.getvalue().splitlines()[-1].endswith("runs/[/b] [red]x :smile:")


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (90061, "1 day, 1:01:01")])
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


TERMINAL = """
import logging
from pathlib import Path
from trainer.monitoring.console import LiveDisplay, open_display
from trainer.monitoring.throughput import Rates
display = open_display(is_main=True, total_steps=30, first_step=5, every=10)
assert isinstance(display, LiveDisplay)
with display:
    display.step(17, epoch=1.5, loss=2.3456, learning_rate=1e-3, seconds_left=3661.0,
                 rates=Rates(12.34, 0.056, 2.0, 3 * 2**30, None))
    display.note("evaluation [1/2]")
    logging.getLogger("trainer.x").warning("a warning")
    print("a library's line")
display.summary({"top1": 0.5}, Path("runs/x"), "mlflow ui " + "x" * 100)
"""


def test_a_terminal_gets_a_live_bar_with_lines_above_it() -> None:
    controller, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80", "LINES": "25"}
    with os.fdopen(controller, "rb", buffering=0) as screen:
        process = subprocess.Popen(
            [sys.executable, "-c", TERMINAL], stdout=terminal, stderr=terminal, env=environment
        )
        os.close(terminal)
        shown = b""
        try:
            while select.select([screen], [], [], 120)[0] and (chunk := screen.read(4096)):
                shown += chunk
        except OSError:  # Linux: the other end is closed
            assert process.wait(60) == 0, shown.decode()
    assert process.wait(60) == 0, shown.decode()
    text = shown.decode()
    for expected in (
        "step 17/30",
        "1:01:01 left",
        "epoch 1.50 · loss 2.3456 · lr 1.00e-03 · 12.3 clips/s · wait 6 % · 3.0 GiB",
        "evaluation [1/2]",
        "a warning",
        "a library's line",
        "x" * 100,
    ):
        assert expected in text, expected
    # The bar is drawn once more below the lines that stay.
    assert text.rindex("step 17/30") > text.index("a library's line")


def test_a_terminal_without_cursor_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(
        open_display(is_main=True, total_steps=1, first_step=0, every=1, file=Terminal()), PlainDisplay
    )
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(
        open_display(is_main=True, total_steps=1, first_step=0, every=1, file=Terminal()), LiveDisplay
    )


def test_a_log_on_a_full_disk_ends_nothing(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        display = PlainDisplay(total_steps=2, every=1, file=full)
        show(display, 1)
        display.warn("no room")
        display.summary(SUMMARY, tmp_path, None)
        with pytest.raises(OSError):
            full.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # for what it still holds


def test_a_character_that_the_terminal_lacks_is_escaped() -> None:
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding="ascii") as file:
        display = open_display(is_main=True, total_steps=1, first_step=0, every=1, file=file)
        display.warn("überholen caf\udce9")
        assert raw.getvalue() == b"warning: \\xfcberholen caf\\udce9\n"
