"""Fuzzes the readers of files: `python -m tests.fuzzing --minutes 5 [--seed 0] [--target video] [--out DIR]`.

Each input that causes an error is kept in DIR, with the error in a text file. Exit code 1 if there are any.
"""

import argparse
import json
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.fuzzing.damage import damaged
from tests.fuzzing.targets import TARGETS, serve

PATIENCE = 30.0  # CPU seconds allowed for one input
STANDSTILL = 300.0  # seconds allowed for one input, on a machine that also runs other programs
HUNGER = 2 * 2**30  # bytes that one input may add to the peak memory
IMPORTS = 90.0  # additional CPU seconds for the first input of a target in a process
RENEWED = 500  # inputs after which the process is replaced, so that slow growth of memory is not reported


class Reader:
    """A process that reads inputs; it is replaced when it has died or hangs."""

    def __init__(self, method: str = "spawn") -> None:
        self._context: Any = multiprocessing.get_context(method)
        self._start()

    def _start(self) -> None:
        self._connection, other = self._context.Pipe()
        self._process = self._context.Process(target=serve, args=(other,), daemon=True)
        self._process.start()
        other.close()
        self._read, self._peak = 0, 0
        self._known: set[str] = set()  # targets whose imports are done

    def end(self) -> None:
        self._process.kill()
        self._process.join()

    def _answers(self, patience: float) -> bool:
        """Whether the process answers within `patience` CPU seconds."""
        begin, end = _seconds(self._process.pid), time.monotonic() + STANDSTILL
        while not self._connection.poll(0.5):
            if _seconds(self._process.pid) - begin > patience or time.monotonic() > end:
                return False
        return True

    def read(self, name: str, path: Path) -> str | None:
        """The error that reading an input causes; None if there is none."""
        if self._read == RENEWED:
            self.end()
            self._start()
        known = name in self._known
        self._known.add(name)
        patience, before = PATIENCE if known else PATIENCE + IMPORTS, self._peak
        self._connection.send_bytes(json.dumps([name, str(path)]).encode())
        found: Any
        try:
            if not self._answers(patience):
                self.end()
                self._start()
                return f"it did not end within {patience:g} s of CPU time or {STANDSTILL:g} s"
            found, self._peak = json.loads(self._connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            self._process.join(10)
            code = self._process.exitcode
            self._start()
            return f"the process died with {code}"
        self._read += 1
        if found is None and known and self._peak - before > HUNGER:
            return f"it took {(self._peak - before) / 2**30:.1f} GiB"
        return found


def _seconds(number: int) -> float:
    """CPU seconds that a process has used; 0 if it has died, which its pipe reports."""
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="in all (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="repeatable (all)")
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"), help="for findings (%(default)s)")
    args = parser.parse_args()
    names = args.target or list(TARGETS)
    chance = random.Random(args.seed)
    tried: Counter[str] = Counter()
    findings: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        whole = {}
        for name in names:
            place = Path(folder) / name
            place.mkdir()
            whole[name] = [path.read_bytes() for path in TARGETS[name].make(place)]
            beside = TARGETS[name].beside
            if beside is not None:
                beside(place)
        reader = Reader()
        end, printed = time.monotonic() + 60 * args.minutes, 0.0
        try:
            while (now := time.monotonic()) < end:
                name = names[sum(tried.values()) % len(names)]
                path = Path(folder) / name / TARGETS[name].name
                path.unlink(missing_ok=True)
                path.write_bytes(damaged(whole[name], chance))
                found = reader.read(name, path)
                tried[name] += 1
                if found is not None:
                    findings[name] += 1
                    args.out.mkdir(parents=True, exist_ok=True)
                    kept = args.out / f"{name}-{args.seed}-{tried[name]}{path.suffix}"
                    shutil.copyfile(path, kept)
                    kept.with_name(f"{kept.name}.txt").write_text(found, encoding="utf-8")
                    print(f"{kept}: {found.strip().splitlines()[-1][:200]}", flush=True)
                if now - printed > 10:
                    printed = now
                    counts = ", ".join(f"{tried[each]} of {each}" for each in names)
                    print(f"{counts}; {sum(findings.values())} findings, {end - now:.0f} s left", flush=True)
        finally:
            reader.end()
    for name in names:
        print(f"{name}: {tried[name]} inputs, {findings[name]} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
