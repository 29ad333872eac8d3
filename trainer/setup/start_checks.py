"""The checks at the start of a run, before anything is built or written; `--check` runs them too."""

import difflib
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from pipelines.dataset.manifest import Manifest
from pipelines.dataset.paths import check_writable
from pipelines.dataset.spot_check import spot_check
from trainer.checkpoint.metadata import (
    CheckpointError,
    TrainState,
    check_allowed_names,
    read_newest,
    read_state,
)
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.weights_origin import check_settings_unchanged
from trainer.config.schema import Recipe
from trainer.errors import RunError
from trainer.monitoring.run_dir import RunDir
from trainer.setup.bad_video_limit import is_surely_over_limit
from trainer.tracking.mlflow_tracker import check_tracking as check_place

_SIZED = 500_000  # rows of a manifest whose sizes are read; of a larger one, a slice of each record batch


def check_tracking(recipe: Recipe, run_dir: Path) -> None:
    """Raises RunError where MLflow cannot record this run. Contacts a server the run has not used before."""
    tracking = recipe.tracking
    if tracking.enabled:
        check_place(run_dir, uri=tracking.uri, experiment=tracking.experiment, ask=True)


def check_run_dir(folder: RunDir) -> None:
    """Raises RunError where the run folder cannot be created or written. Leaves no file."""
    try:
        check_writable(folder.path)
    except OSError as error:
        raise RunError(
            f"the run folder {folder.path} cannot be written ({error.filename}: {error.strerror}); choose "
            "another with --run-dir"
        ) from error


def check_resume(folder: RunDir, resume: str) -> None:
    """Raises RunError where `--resume never` finds a run, or a named checkpoint does not exist."""
    holds_run = folder.recipe.exists() and any(folder.checkpoints.glob("step-*"))
    if holds_run and resume == "never":
        raise RunError(
            f"{folder.path} holds a run with checkpoints, and --resume is never; choose another folder "
            "with --run-dir, or resume the run with --resume auto"
        )
    if resume not in ("auto", "never") and not Path(resume).is_dir():
        near = difflib.get_close_matches(resume, ("auto", "never"), n=1)
        hint = f"did you mean {near[0]}?" if near else "auto finds the newest"
        raise RunError(f"--resume {resume}: there is no such checkpoint folder; {hint}")
    if resume not in ("auto", "never") and (Path(resume) / "checkpoints").is_dir():
        raise RunError(f"--resume {resume} is a run's folder: name one of its checkpoints/step-...")


def check_videos(recipe: Recipe, manifests: Sequence[Manifest]) -> tuple[str, ...]:
    """Open a few videos of each manifest, given in the order of `data.manifest_fields`.

    Returns notes on videos that cannot be used. Raises RunError where the sample shows that the share of bad
    videos is above data.bad_share.
    """
    notes, refused = [], []
    for (field, path), manifest in zip(recipe.data.manifest_fields, manifests, strict=True):
        found = spot_check(manifest, f"{field} ({path})", storage=recipe.data.storage)
        bad = len(found.bad_samples)
        if is_surely_over_limit(bad, recipe.data.bad_share, found.opened, found.videos):
            refused.append(found.message)
        elif bad:
            notes.append(found.message)
    if refused:
        raise RunError("\n".join(refused))
    return tuple(notes)


def short_side_notes(recipe: Recipe, train: Sequence[Manifest]) -> tuple[str, ...]:
    """How many training videos `augmentation.max_short_side` scales down, by at most `_SIZED` rows of each
    manifest; nothing without the field. Raises DataError where a manifest is damaged."""
    most = recipe.augmentation.max_short_side
    if most is None:
        return ()
    scaled = rows = 0
    for manifest in train:
        for batch in manifest.batch_slices(1 + len(manifest) // _SIZED):
            sides = pc.min_element_wise(batch.column("width"), batch.column("height"))
            scaled += pc.sum(pc.greater(sides, most)).as_py() or 0
            rows += len(batch)
    if not scaled:
        return (
            f"augmentation.max_short_side: {most} has no effect: no training video has a short side of more "
            "pixels",
        )
    return (
        f"augmentation.max_short_side: {most} scales down {100 * scaled / rows:.3g} % of the training videos",
    )


def check_checkpoint(
    folder: RunDir,
    settings: dict[str, Any],
    resume: str,
    allowed: Sequence[str],
    assumed: Collection[str] = (),
) -> tuple[str, ...]:
    """Compare the settings of a run with those of the checkpoint from which it would resume.

    assumed: settings that depend on ranks or memory, which `--check` only assumes. A difference in these
    gives a note instead of an error.

    Returns the notes. Raises RunError where other settings differ, and as `check_resume`. Reads the
    checkpoint's metadata, no tensors.
    """
    check_resume(folder, resume)
    resumed = _read_resumed(folder, resume)
    if resumed is None:
        check_allowed_names(allowed, settings)
        return ()
    found, state = resumed
    then = state.settings
    other = [name for name in assumed if name in then.keys() & settings and then[name] != settings[name]]
    check_settings_unchanged(found, state, settings, [*allowed, *other])
    return tuple(
        f"with these ranks and memory, which --check assumes: {name}: {then[name]} in checkpoint "
        f"{found}, {settings[name]} now. With these values the run would not resume"
        for name in other
        if name not in allowed
    )


def resumed_state(folder: RunDir, resume: str) -> TrainState | None:
    """The metadata of the checkpoint that a run would resume from, unless its tensors are damaged.

    None for a new training, and where no metadata can be read, which `check_checkpoint` and the start report.
    """
    with suppress(CheckpointError):
        resumed = _read_resumed(folder, resume)
        return None if resumed is None else resumed[1]
    return None


def _read_resumed(folder: RunDir, resume: str) -> tuple[Path, TrainState] | None:
    """The checkpoint that a run would resume from, and its metadata; None for a new training.

    The newest one with readable metadata, or the one that `resume` names; the tensors are not read. Raises
    CheckpointError where none can be read.
    """
    if resume == "never":
        return None
    if resume != "auto":
        return Path(resume), read_state(Path(resume))
    return read_newest(Retention(folder.checkpoints).visible())
