"""The checks at the start of a run and with `--check`."""

from pathlib import Path

import pytest

from trainer.checkpoint.metadata import TrainState, check_allowed_names, check_settings, write_state
from trainer.errors import RunError
from trainer.monitoring.run_dir import RunDir
from trainer.setup.start_checks import check_checkpoint, check_resume, check_run_dir

KEPT = {"seed": 1, "optimisation.eps": 1e-8, "data.train (ratios)": None, "data.train (names)": 3}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("sed", "did you mean 'seed'?"),
        ("eps", "did you mean 'optimisation.eps'?"),
        ("data.train", "did you mean 'data.train (names)' or 'data.train (ratios)'?"),
        ("qqq", "allowed: the names that a refusal gives"),
    ],
)
def test_an_unknown_name_of_allow_change_is_refused_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(RunError) as refusal:
        check_allowed_names(["seed", name], KEPT)
    assert str(refusal.value).startswith(f"--allow-change '{name}': ") and str(refusal.value).endswith(hint)


def test_names_of_the_checkpoint_alone_or_the_run_alone_are_allowed(tmp_path: Path) -> None:
    check_settings(tmp_path, {"old": 1}, {"new": 2}, ["old", "new"])
    with pytest.raises(RunError, match="--allow-change 'nex'"):
        check_settings(tmp_path, {"old": 1}, {"old": 1}, ["nex"])


def test_a_field_of_the_model_that_a_checkpoint_lacks_has_its_default(tmp_path: Path) -> None:
    name = "model.overrides.relative_positions"
    check_settings(tmp_path, {}, {name: False}, [])
    with pytest.raises(RunError, match=f"{name}: false then, true now"):
        check_settings(tmp_path, {}, {name: True}, [])


def test_the_newest_readable_checkpoint_is_compared(tmp_path: Path) -> None:
    folder = RunDir(tmp_path)
    check_checkpoint(folder, {"seed": 1}, "auto", [])  # there is none
    for step in (3, 20):
        path = folder.checkpoints / f"step-{step:07d}"
        path.mkdir(parents=True)
        write_state(path, TrainState(step, 0, 0, {}, step, 1, 1, {"seed": step}, 0.0, {}))
    with pytest.raises(RunError, match="step-0000020 is of another training:\n  seed: 20 then, 1 now"):
        check_checkpoint(folder, {"seed": 1}, "auto", [])
    check_checkpoint(folder, {"seed": 1}, "auto", ["seed"])
    check_checkpoint(folder, {"seed": 1}, "never", [])
    (folder.checkpoints / "step-0000020/state.json").write_text("damaged")
    check_checkpoint(folder, {"seed": 3}, "auto", [])
    with pytest.raises(RunError, match="step-0000020 cannot be used"):
        check_checkpoint(folder, {"seed": 3}, str(folder.checkpoints / "step-0000020"), [])


def test_a_wrong_value_of_resume_has_a_hint(tmp_path: Path) -> None:
    for resume, hint in (("atuo", "did you mean auto"), ("/none/step-3", "auto finds the newest")):
        with pytest.raises(RunError, match=hint):
            check_resume(RunDir(tmp_path), resume)


def test_the_check_does_not_create_the_run_folder(tmp_path: Path) -> None:
    check_run_dir(RunDir(tmp_path / "a/b"))
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").touch()
    with pytest.raises(RunError, match=r"a/b cannot be written \(.*/a: Not a directory\)"):
        check_run_dir(RunDir(tmp_path / "a/b"))


def test_the_message_for_another_model_names_export_and_model_weights(tmp_path: Path) -> None:
    folder = RunDir(tmp_path)
    path = folder.checkpoints / "step-0000020"
    path.mkdir(parents=True)
    then = {"seed": 20, "model.num_classes": 8}
    write_state(path, TrainState(20, 0, 0, {}, 20, 1, 1, then, 0.0, {}))
    with pytest.raises(RunError, match=r"launch/export\.py .*step-0000020 --out FILE.*model\.weights=FILE"):
        check_checkpoint(folder, {"seed": 20, "model.num_classes": 4}, "auto", [])
    with pytest.raises(RunError) as refused:
        check_checkpoint(folder, {"seed": 1, "model.num_classes": 8}, "auto", [])
    assert "model.weights" not in str(refused.value)
