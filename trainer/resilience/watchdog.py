"""A watchdog that ends a rank without progress, with a report, so that the job can be restarted.

A thread of each rank checks the time since the last beat. After the limit, the rank writes the stacks of all
threads into `hangs/` of the run directory. The lowest of the ranks that did so reads the others' files and
prints where each rank is: most wait in a collective for the one that is missing.

The thread needs Python's global lock. If a library call holds it forever, a timer of the interpreter writes
the stacks to standard error and ends the process with exit code 1, the only one it supports.
"""

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Self

from pipelines.atomic_file import atomic_file
from trainer.resilience.signals import REQUEUE
from trainer.system.formatting import format_ranks

_ROOT = Path(__file__).parents[2]
_PACKAGES = tuple(
    str(_ROOT / name) + os.sep for name in ("launch", "trainer", "pipelines", "benchmarks", "models")
)

_CHECKS = 8  # per limit: a hang is detected at most an eighth of the limit late
_LONGEST_PAUSE = 5.0  # seconds between two checks


@dataclass
class Watchdog:
    """A context manager; inside, call `beat` at every sign of progress."""

    run_dir: Path
    """The run directory, in which `hangs/` is created if needed."""
    rank: int
    world_size: int
    limit: float | None
    """Seconds without progress after which a rank hangs; None: no watchdog, as under a debugger."""
    grace: float = 15.0
    """Seconds that a rank waits for the files of the others."""

    def __post_init__(self) -> None:
        self._folder = self.run_dir / "hangs"
        self._beat = (time.monotonic(), "the start")
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self.limit is not None:
            self.beat("the start")
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.limit is not None:
            self._closed.set()
            self._thread.join()

    def beat(self, where: str) -> None:
        """Record progress, from any thread; `where` follows "last sign of progress: ", such as "step 12"."""
        self._beat = (time.monotonic(), where)

    def _watch(self) -> None:
        assert self.limit is not None
        pause = min(self.limit / _CHECKS, _LONGEST_PAUSE)
        awake_since = before = time.monotonic()
        while True:
            # Later than `_end` on the other ranks, whose exit code requests a restart.
            faulthandler.dump_traceback_later(self.limit + 2 * self.grace + 2 * pause, exit=True, file=2)
            if self._closed.wait(pause):
                faulthandler.cancel_dump_traceback_later()
                return
            now = time.monotonic()
            if now - before > 2 * pause + 1.0:
                # The whole process was suspended, with the machine, so the loop could not beat.
                awake_since = now
            before = now
            since, where = self._beat
            if now - max(since, awake_since) > self.limit:
                self._end(now - since, where)
                awake_since = before = time.monotonic()

    def _end(self, age: float, where: str) -> None:
        """Write this rank's file, print the summary if this is the lowest rank that hangs, and exit.

        Returns if there was progress meanwhile: the rank was slow.
        """
        hung = self._beat
        continued = False
        try:
            self._write(age, where)
            if self._closed.wait(self.grace) or self._beat is not hung:
                continued = True
                self._print(
                    f"note: rank {self.rank} continues: {self._beat[1]} came after {age + self.grace:.0f} s"
                )
                return
            with contextlib.suppress(OSError):  # printed already, if the folder cannot be written
                if next(self._ranks_with_file()) == self.rank:
                    self._print_summary(age)
                else:  # a launcher ends all ranks after the first exit: not before the summary
                    time.sleep(self.grace / 2)
        finally:
            if not continued:
                os._exit(REQUEUE)

    def _write(self, age: float, where: str) -> None:
        """Write this rank's file; its first line is the rank's position."""
        words, own, innermost = _place(sys._current_frames()[threading.main_thread().ident or 0])
        path = self._path(self.rank)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as partial, open(partial, "w", encoding="utf-8") as file:
                file.write(
                    f"{words}\n\n"
                    f"rank {self.rank} of {self.world_size}, process {os.getpid()} on "
                    f"{socket.gethostname()}, {datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}\n"
                    f"last sign of progress: {where}, {age:.0f} s ago\n"
                    f"innermost of this program: {own}\ninnermost of all: {innermost}\n\n"
                )
                file.flush()
                faulthandler.dump_traceback(file)
        except OSError as error:
            self._print(f"error: rank {self.rank} hangs {words}; {path} cannot be written: {error.strerror}")

    def _ranks_with_file(self) -> Iterator[int]:
        """The ranks with a file of this hang, ascending. Raises OSError if this rank has none.

        Files of an earlier hang are older by the limit at least. The generator reads a file's age only when
        needed: nearly all ranks need the first only.
        """
        own = self._path(self.rank).stat().st_mtime  # by the filesystem's clock, as for the others' files
        for path in sorted(self._folder.glob("rank-*.txt")):
            if own - path.stat().st_mtime < (self.limit or 0.0):
                yield int(path.stem.removeprefix("rank-"))

    def _print_summary(self, age: float) -> None:
        places: dict[str, list[int]] = {}
        for rank in self._ranks_with_file():
            words = self._path(rank).read_text(encoding="utf-8").partition("\n")[0]
            places.setdefault(words, []).append(rank)
        parts = [f"{format_ranks(ranks)} {_verb(ranks, place)} {place}" for place, ranks in places.items()]
        silent = sorted(set(range(self.world_size)).difference(*places.values()))
        if silent:
            have = "has" if len(silent) == 1 else "have"
            parts.append(
                f"{format_ranks(silent)} {have} written nothing: stopped, dead, or in a call that does not "
                "return to Python, whose stacks then follow on standard error"
            )
        text = (
            f"no progress for {age:.0f} s: {'; '.join(parts)}. {self._folder} holds the stacks of all "
            f"threads. All ranks end with exit code {REQUEUE}, which requests a restart"
        )
        self._print(f"error: {text}")
        (self._folder / "summary.txt").write_text(f"{text}\n", encoding="utf-8")

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.txt"

    @staticmethod
    def _print(text: str) -> None:
        # Not `print`: the hanging thread may hold its lock.
        with contextlib.suppress(OSError):
            os.write(2, f"\n{text}\n".encode())


def _place(frame: FrameType) -> tuple[str, str, str]:
    """A thread's position for the summary, its innermost line in this program, and its innermost line."""
    innermost, name = _line(frame), frame.f_code.co_name
    own: FrameType | None = frame
    while own is not None and not os.path.abspath(own.f_code.co_filename).startswith(_PACKAGES):
        own = own.f_back
    if own is None:
        return f"at {innermost}", "none", innermost
    if own is frame:
        return f"at {innermost}", innermost, innermost
    return f"in {name} ({_line(own)})", _line(own), innermost


def _line(frame: FrameType) -> str:
    """A frame as `trainer/trainer.py:66 fit`, relative to this program or its libraries."""
    path = os.path.abspath(frame.f_code.co_filename)
    for lead in (f"{_ROOT}{os.sep}", f"{os.sep}site-packages{os.sep}"):
        path = path.partition(lead)[2] or path
    return f"{path}:{frame.f_lineno} {frame.f_code.co_name}"


def _verb(ranks: list[int], place: str) -> str:
    """`waits` inside a library call, `is` in a line of this program, which may be computing."""
    if place.startswith("in "):
        return "waits" if len(ranks) == 1 else "wait"
    return "is" if len(ranks) == 1 else "are"
