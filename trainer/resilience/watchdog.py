"""A rank that makes no progress says where it is, and ends itself, so that the job can be started again.

A thread of each rank looks at the age of the last sign of progress. When that is too old, the rank writes
what all its threads are doing into `hangs/` of the run folder; the lowest rank that did so reads what the
others wrote, and tells which rank is where: most wait in a collective for the one that does not come.

The thread needs Python's global lock. Where a call into a library keeps that for ever, a timer of the
interpreter's own writes the stacks to standard error and ends the process; it knows one exit code only, 1.
"""

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

from pipelines.atomic_file import atomic_file
from trainer.resilience.signals import REQUEUE
from trainer.system.formatting import format_ranks

_ROOT = Path(__file__).parents[2]
_PACKAGES = tuple(str(_ROOT / name) + os.sep for name in ("launch", "trainer", "pipelines", "models"))

_CHECKS = 8  # within the limit, so that a hang is seen an eighth of it late at most
_LONGEST_PAUSE = 5.0  # seconds between two checks


class Watchdog:
    """A context manager: inside, `beat` is to be called at every sign of progress.

    beat: may be called from any thread, and costs no more than an assignment.
    """

    def __init__(
        self, folder: Path, *, rank: int, world_size: int, limit: float | None, grace: float = 15.0
    ) -> None:
        """
        Args:
            folder: of the run; `hangs/` is made in it when there is something to write.
            rank: this process's.
            world_size: how many ranks there are.
            limit: seconds without progress after which a rank hangs; None never says so, as under a debugger.
            grace: seconds that ranks wait for one another's words before the end.
        """
        self._folder = folder / "hangs"
        self._rank = rank
        self._world_size = world_size
        self._limit = limit
        self._grace = grace
        self._beat = (time.monotonic(), "the start")
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self._limit is not None:
            self.beat("the start")
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._limit is not None:
            self._closed.set()
            self._thread.join()

    def beat(self, where: str) -> None:
        """Say that there is progress; `where` follows "last sign of progress: ", such as "step 12"."""
        self._beat = (time.monotonic(), where)

    def _watch(self) -> None:
        assert self._limit is not None
        pause = min(self._limit / _CHECKS, _LONGEST_PAUSE)
        awake_since = before = time.monotonic()
        while True:
            # Later than the others end themselves: theirs is the exit code that has the job started again.
            faulthandler.dump_traceback_later(self._limit + 2 * self._grace + 2 * pause, exit=True, file=2)
            if self._closed.wait(pause):
                faulthandler.cancel_dump_traceback_later()
                return
            now = time.monotonic()
            if now - before > 2 * pause + 1.0:
                # The whole process stood still, as after a suspended machine: the loop could not beat either.
                awake_since = now
            before = now
            since, where = self._beat
            if now - max(since, awake_since) > self._limit:
                self._end(now - since, where)
                awake_since = before = time.monotonic()

    def _end(self, age: float, where: str) -> None:
        """Write down where this rank is, tell where all are if it is this one's to tell, and end.

        Returns where there was progress meanwhile: it was slow, and does not hang.
        """
        hung = self._beat
        gone_on = False
        try:
            self._write(age, where)
            if self._closed.wait(self._grace) or self._beat is not hung:
                gone_on = True
                self._say(
                    f"note: rank {self._rank} goes on: {self._beat[1]} came after {age + self._grace:.0f} s"
                )
                return
            with contextlib.suppress(OSError):  # said already, where the folder could not be written
                if next(self._written()) == self._rank:
                    self._tell(age)
                else:  # a launcher that sees one rank gone ends the others: not before one has told
                    time.sleep(self._grace / 2)
        finally:
            if not gone_on:
                os._exit(REQUEUE)

    def _write(self, age: float, where: str) -> None:
        """Write this rank's file: its first line is where the rank is."""
        words, own, innermost = _place(sys._current_frames()[threading.main_thread().ident or 0])
        path = self._path(self._rank)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as partial, open(partial, "w", encoding="utf-8") as file:
                file.write(
                    f"{words}\n\n"
                    f"rank {self._rank} of {self._world_size}, process {os.getpid()} on "
                    f"{socket.gethostname()}, {datetime.now().astimezone():%Y-%m-%d %H:%M:%S %z}\n"
                    f"last sign of progress: {where}, {age:.0f} s ago\n"
                    f"innermost of this program: {own}\ninnermost of all: {innermost}\n\n"
                )
                file.flush()
                faulthandler.dump_traceback(file)
        except OSError as error:
            self._say(f"error: rank {self._rank} hangs {words}; {path} cannot be written: {error.strerror}")

    def _written(self) -> Iterator[int]:
        """The ranks that wrote in this hang, ascending; raises OSError when this one could not.

        A file of an earlier hang is older by the limit at least. Each file's age is looked at only when it is
        asked for: nearly all ranks ask for the first.
        """
        own = self._path(self._rank).stat().st_mtime  # by the filesystem's clock, as for the others' files
        for path in sorted(self._folder.glob("rank-*.txt")):
            if own - path.stat().st_mtime < (self._limit or 0.0):
                yield int(path.stem.removeprefix("rank-"))

    def _tell(self, age: float) -> None:
        places: dict[str, list[int]] = {}
        for rank in self._written():
            words = self._path(rank).read_text(encoding="utf-8").partition("\n")[0]
            places.setdefault(words, []).append(rank)
        parts = [f"{format_ranks(ranks)} {_verb(ranks, place)} {place}" for place, ranks in places.items()]
        silent = sorted(set(range(self._world_size)).difference(*places.values()))
        if silent:
            have = "has" if len(silent) == 1 else "have"
            parts.append(
                f"{format_ranks(silent)} {have} said nothing: stopped, dead, or in a call that never "
                "returns to Python, whose stacks then follow on standard error"
            )
        text = (
            f"no progress for {age:.0f} s: {'; '.join(parts)}. {self._folder} holds the stacks of all "
            f"threads. All ranks end with exit code {REQUEUE}, to be started again from the last checkpoint"
        )
        self._say(f"error: {text}")
        (self._folder / "summary.txt").write_text(f"{text}\n", encoding="utf-8")

    def _path(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05d}.txt"

    @staticmethod
    def _say(text: str) -> None:
        # Not `print`: the thread that hangs may hold its lock.
        with contextlib.suppress(OSError):
            os.write(2, f"\n{text}\n".encode())


def _place(frame: FrameType) -> tuple[str, str, str]:
    """Where a thread is: in words for a summary; its innermost line in this program's files; and of all."""
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
    """`trainer/trainer.py:66 fit`: a frame without the folders above this program or its libraries."""
    path = os.path.abspath(frame.f_code.co_filename)
    for lead in (f"{_ROOT}{os.sep}", f"{os.sep}site-packages{os.sep}"):
        path = path.partition(lead)[2] or path
    return f"{path}:{frame.f_lineno} {frame.f_code.co_name}"


def _verb(ranks: list[int], place: str) -> str:
    """A rank that is inside a library's call waits, most likely; what is in our own line may be computing."""
    if place.startswith("in "):
        return "waits" if len(ranks) == 1 else "wait"
    return "is" if len(ranks) == 1 else "are"
