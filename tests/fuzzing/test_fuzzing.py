"""The fuzzer finds what it looks for, and all whole inputs are read."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.fuzzing import __main__ as fuzzer
from tests.fuzzing.damage import damaged
from tests.fuzzing.targets import TARGETS, Target


def test_damage_depends_on_the_seed_alone_and_damages() -> None:
    whole = [bytes(range(256)) * 20, b"name: x\n"]
    once, again = ([damaged(whole, random.Random(seed)) for seed in range(200)] for _ in range(2))
    assert once == again
    assert sum(data in whole for data in once) < 20


@pytest.mark.soak
@pytest.mark.parametrize("name", sorted(TARGETS))
def test_whole_inputs_are_read(tmp_path: Path, name: str) -> None:
    target = TARGETS[name]
    if target.beside is not None:
        target.beside(tmp_path)
    for whole in target.make(tmp_path)[:2]:
        target.read(whole)


def read_by_its_words(path: Path) -> None:
    match path.read_text():
        case "raise":
            raise IndexError("nobody told of it in words")
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hang":
            time.sleep(100)
        case "busy":
            while True:
                pass
        case "hunger":
            assert bytearray(80 * 2**20)


def test_errors_deaths_hangs_and_hunger_are_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process that is forked: it has this test's target."""
    monkeypatch.setitem(TARGETS, "words", Target("words.txt", lambda _: [], read_by_its_words))
    monkeypatch.setattr(fuzzer, "PATIENCE", 1.0)
    monkeypatch.setattr(fuzzer, "STANDSTILL", 3.0)
    monkeypatch.setattr(fuzzer, "IMPORTS", 4.0)
    monkeypatch.setattr(fuzzer, "HUNGER", 40 * 2**20)
    path = tmp_path / "words.txt"
    reader = fuzzer.Reader("fork")
    try:
        for text, expected in [
            ("", None), ("raise", "IndexError: nobody told"), ("die", "died with -9"), ("", None),
            ("hang", "no end within 1 s of CPU or 3 s"), ("busy", "no end"), ("", None),
            ("hunger", "it took 0.1 GiB"), ("", None),
        ]:  # fmt: skip
            path.write_text(text)
            found = reader.read("words", path)
            assert (found is None) if expected is None else expected in str(found), (text, found)
    finally:
        reader.end()
