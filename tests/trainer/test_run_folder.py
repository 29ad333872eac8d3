"""What a run's folder remembers from one start to the next."""

from pathlib import Path

from trainer.run_folder import RunFolder


def test_the_longest_save_of_earlier_starts(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.longest_save() == 0
    folder.event("checkpoint", step=1, path="x")  # as an older version of this program wrote it
    assert folder.longest_save() == 0
    for step, seconds in enumerate((2.5, 40.0, 3.0)):
        folder.event("checkpoint", step=step, path="x", seconds=seconds)
        folder.event("step", step=step, loss=1.0)
    assert folder.longest_save() == 40
