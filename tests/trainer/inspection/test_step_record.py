"""Finding a step in events of any length, also after a crash."""

from pathlib import Path

import pytest

from trainer.inspection.step_record import find_step
from trainer.monitoring.run_dir import RunDir


@pytest.fixture
def folder(tmp_path: Path) -> RunDir:
    """A run that crashed after steps 1 to 30 and then did 21 to 60 on another device."""
    folder = RunDir(tmp_path)
    for device, steps in (("cuda", range(1, 31)), ("cpu", range(21, 61))):
        folder.append_event(
            "start", step=steps[0] - 1, device=device, world_size=2, train_manifests=[["a.arrow", device]]
        )
        for step in steps:
            folder.append_event("step", step=step, total_steps=60, batch_hash=f"{device}-{step}")
            folder.append_event("data", step=step, limit="x" * 100)
    return folder


def test_the_last_record_of_a_step_counts(folder: RunDir) -> None:
    for step, device in ((1, "cuda"), (20, "cuda"), (21, "cpu"), (30, "cpu"), (60, "cpu")):
        found = find_step(folder.events, step)
        assert found is not None and found.batch_hash == f"{device}-{step}"
        assert (found.device, found.world_size) == (device, 2)
        assert found.manifests == (("a.arrow", device),)
    assert find_step(folder.events, 61) is None
    assert find_step(folder.events, 6) != find_step(folder.events, 60)


def test_an_incomplete_line_is_ignored(folder: RunDir) -> None:
    whole = folder.events.read_bytes()
    line = next(line for line in whole.splitlines() if b'"step": 33,' in line)
    folder.events.write_bytes(whole + line.replace(b"cpu-33", b"cut-33")[:-3])
    found = find_step(folder.events, 33)
    assert found is not None and found.batch_hash == "cpu-33"


def test_old_and_damaged_records_lack_values(tmp_path: Path) -> None:
    folder = RunDir(tmp_path)
    folder.append_event("start", step=0, train_manifests=[["one"], 3], device=4)
    folder.append_event("step", step=1, loss=1.0)
    found = find_step(folder.events, 1)
    assert found is not None
    assert (found.batch_hash, found.device, found.world_size, found.manifests) == (None, None, None, None)
    folder.events.write_bytes(bytes(2**16))
    assert find_step(folder.events, 1) is None


@pytest.mark.soak
def test_millions_of_lines_need_seconds_and_little_memory(tmp_path: Path) -> None:
    import time
    import tracemalloc

    folder = RunDir(tmp_path)
    folder.append_event("start", step=0, device="cpu")
    folder.append_event("step", step=1, total_steps=5_000_000, batch_hash="first")
    line = '{"event": "step", "time": 1790000000.0, "step": %d, "loss": 1.5, "x": "%s"}\n'
    with open(folder.events, "a") as file:
        for begin in range(2, 5_000_000, 100_000):
            file.write("".join(line % (step, "y" * 120) for step in range(begin, begin + 100_000)))
    tracemalloc.start()
    began = time.monotonic()
    found = find_step(folder.events, 1)
    seconds = time.monotonic() - began
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found is not None and found.batch_hash == "first"
    assert peak < 64 * 2**20 and seconds < 60
