"""The fuzzer reports errors, crashes, hangs and excessive memory; all valid inputs are read."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.fuzzing import __main__ as fuzzer
from tests.fuzzing.damage import damaged
from tests.fuzzing.targets import TARGETS, Target


def test_damage_depends_only_on_the_seed() -> None:
    whole = [bytes(range(256)) * 20, b"name: x\n"]
    once, again = ([damaged(whole, random.Random(seed)) for seed in range(200)] for _ in range(2))
    assert once == again
    assert sum(data in whole for data in once) < 20


@pytest.mark.soak
@pytest.mark.parametrize("name", sorted(TARGETS))
def test_valid_inputs_are_read(tmp_path: Path, name: str) -> None:
    target = TARGETS[name]
    if target.beside is not None:
        target.beside(tmp_path)
    for whole in target.make(tmp_path)[:2]:
        target.read(whole)


def read_by_content(path: Path) -> None:
    match path.read_text():
        case "raise":
            raise IndexError("unexpected")
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            time.sleep(100)
        case "busy":
            while True:
                pass
        case "hunger":
            assert bytearray(80 * 2**20)


def test_errors_crashes_hangs_and_excessive_memory_are_findings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a forked process, which has the target of this test."""
    monkeypatch.setitem(TARGETS, "words", Target("words.txt", lambda _: [], read_by_content))
    monkeypatch.setattr(fuzzer, "PATIENCE", 1.0)
    monkeypatch.setattr(fuzzer, "STANDSTILL", 3.0)
    monkeypatch.setattr(fuzzer, "IMPORTS", 4.0)
    monkeypatch.setattr(fuzzer, "HUNGER", 40 * 2**20)
    path = tmp_path / "words.txt"
    reader = fuzzer.Reader("fork")
    try:
        for text, expected in [
            ("", None), ("raise", "IndexError: unexpected"), ("die", "died with -9"), ("", None),
            ("hang", "not end within 1 s of CPU time or 3 s"), ("busy", "not end"), ("", None),
            ("hunger", "it took 0.1 GiB"), ("", None),
        ]:  # fmt: skip
            path.write_text(text)
            found = reader.read("words", path)
            assert (found is None) if expected is None else expected in str(found), (text, found)
    finally:
        reader.end()
