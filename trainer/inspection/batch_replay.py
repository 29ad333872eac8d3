"""Recreates the clips of a training step from the run's recipe, manifests and seed."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.augment.params import TrainClipSpec
from pipelines.autotune import LoaderOptions
from pipelines.batch_contents import ClipDescription, describe_batch
from pipelines.batch_hash import format_hash, split_halves
from pipelines.dataset.concat import Dataset
from pipelines.dataset.manifest import Manifest
from pipelines.loader import train_loader
from pipelines.sampling.sampler import TrainSampler
from pipelines.worker_pool import Progress
from trainer.checkpoint.metadata import CheckpointError, read_state
from trainer.checkpoint.retention import Retention
from trainer.config.load import load_recipe
from trainer.config.schema import Recipe
from trainer.distributed.environment import describe_environment
from trainer.errors import RunError
from trainer.inspection.contact_sheet import denormalise
from trainer.inspection.step_record import StepRecord, find_step
from trainer.monitoring.run_dir import RunDir
from trainer.setup.preparation import mixing, model_config, resolve_flip, train_clip, train_sampler
from trainer.system.files import read_json

_MICRO_BATCH = 8  # clips per batch of the loader; their content does not depend on it


@dataclass(frozen=True)
class ReplayedClip:
    """One clip of a replayed step.

    planned: sample, frames and augmentation of the clip.
    valid: whether its video could be read.
    frames: some of its frames, uint8 RGB (F, H, W, 3); empty if the clip is not shown.
    columns: the indices of these frames in the clip.
    """

    planned: ClipDescription
    valid: bool
    frames: Tensor
    columns: tuple[int, ...]


@dataclass(frozen=True)
class ReplayedStep:
    """The clips of a step.

    step: number of the step, from 1.
    clips: in the order of the global batch.
    class_names: classes of the manifests.
    batch_hash: hash of all clips.
    recorded: the step in the run's events; None if it is missing.
    notes: possible reasons for differences from the run's clips.
    """

    step: int
    clips: tuple[ReplayedClip, ...]
    class_names: tuple[str, ...]
    batch_hash: str
    recorded: StepRecord | None
    notes: tuple[str, ...]

    @property
    def equal(self) -> bool | None:
        """Whether the hash equals the recorded one; None if none was recorded."""
        if self.recorded is None or self.recorded.batch_hash is None:
            return None
        return self.recorded.batch_hash == self.batch_hash


def replay_step(
    folder: RunDir,
    step: int,
    *,
    device: torch.device,
    shown: int,
    columns: int,
    manifests: Sequence[Path] = (),
    making: Progress | None = None,
) -> ReplayedStep:
    """Make the clips of `step` with the training loader.

    Args:
        folder: the run directory. step: number of the step, from 1 as in the run's messages. device: for
        decoding and augmentation. shown: number of clips that keep up to `columns` frames; all clips are made
        and hashed. manifests: present paths of the training manifests, in the recipe's order; by default
        those of the recipe. making: called with the number of clips that were made and their total.

    Raises:
        RunError: the folder is no run directory, the run has no such step, or a manifest differs from the
        run's. RecipeError, DataError: a recipe or manifest cannot be read.
    """
    recipe = _recipe(folder, manifests)
    _check_step(folder, recipe, step)
    recorded = find_step(folder.events, step) if folder.events.exists() else None
    train = Dataset([Manifest.open(part.manifest) for part in recipe.data.train_manifests])
    notes = _check_manifests(folder, recipe, train, recorded)
    sampler = train_sampler(recipe, train)
    flip, _ = resolve_flip(recipe, train.class_names)
    clip = train_clip(recipe, model_config(recipe, len(train.class_names)), flip)
    share = folder.read_graph_share()
    options = LoaderOptions(
        device=device,
        decoder=recipe.data.decoder,
        prefetch=1,
        graph_share=share,
        storage=recipe.data.storage,
    )
    if options.splits and share is None:
        notes += (f"{folder.decoding} has no decoder split; it was measured again",)
    if recipe.clip_group > recipe.sampling.repeats:
        notes += ("augmentation.mixup or cutmix: a clip shows its partner too; the label is its own",)
    clips, batch_hash = _make(train, sampler, clip, recipe, step, options, shown, columns, making)
    done = ReplayedStep(step, clips, train.class_names, batch_hash, recorded, notes)
    if done.equal is False:
        return replace(done, notes=(*notes, *_differences(folder, done, device)))
    return done


def _recipe(folder: RunDir, manifests: Sequence[Path]) -> Recipe:
    if not folder.recipe.is_file():
        raise RunError(f"{folder.path} has no {folder.recipe.name}: name a run directory")
    recipe = load_recipe(folder.recipe)
    if not manifests:
        return recipe
    parts = recipe.data.train_manifests
    if len(manifests) != len(parts):
        raise RunError(f"the run trained on {len(parts)} manifests, and --train names {len(manifests)}")
    moved = [part.model_copy(update={"manifest": path}) for part, path in zip(parts, manifests, strict=True)]
    data = recipe.data.model_copy(update={"train": tuple(moved)})
    return recipe.model_copy(update={"data": data})


def _check_step(folder: RunDir, recipe: Recipe, step: int) -> None:
    if step < 1:
        raise RunError(f"--step {step}: steps are counted from 1")
    last = folder.find_last_event("step", "start") or {}
    total = last.get("total_steps", recipe.optimisation.steps)
    if isinstance(total, int) and step > total:
        raise RunError(f"--step {step}: the run in {folder.path} has {total} steps")


def _check_manifests(
    folder: RunDir, recipe: Recipe, train: Dataset, recorded: StepRecord | None
) -> tuple[str, ...]:
    """Raises RunError for a manifest that differs from the run's."""
    now = [manifest.fingerprint for manifest in train.manifests]
    paths = [part.manifest for part in recipe.data.train_manifests]
    fix = "its clips would differ. Name the run's own manifest with --train"
    if recorded is not None and recorded.manifests is not None:
        if len(recorded.manifests) != len(now):
            raise RunError(
                f"the run trained on {len(recorded.manifests)} manifests; its recipe names {len(now)}"
            )
        for path, fingerprint, (_, then) in zip(paths, now, recorded.manifests, strict=True):
            if fingerprint != then:
                raise RunError(
                    f"{path} has the fingerprint {fingerprint[:16]}, and had {then[:16]} in the run: {fix}"
                )
        return ()
    before = _fingerprint_of_checkpoints(folder)
    if before is None:
        return (f"{folder.path} has no fingerprints of its manifests: they are assumed to be the same",)
    if train.fingerprint != before:
        raise RunError(
            f"{train} has the fingerprint {train.fingerprint[:16]}, and had {before[:16]} in the run: {fix}"
        )
    return ()


def _fingerprint_of_checkpoints(folder: RunDir) -> str | None:
    """The fingerprint of the training set in the newest readable checkpoint."""
    for path in reversed(Retention(folder.checkpoints).visible()):
        try:
            found = read_state(path).settings.get("data.train (fingerprint)")
        except CheckpointError:
            continue  # the checkpoint before it has the same fingerprint
        return found if isinstance(found, str) else None
    return None


def _make(
    train: Dataset,
    sampler: TrainSampler,
    clip: TrainClipSpec,
    recipe: Recipe,
    step: int,
    options: LoaderOptions,
    shown: int,
    columns: int,
    making: Progress | None,
) -> tuple[tuple[ReplayedClip, ...], str]:
    micro_batch = _micro_batch(sampler.global_batch, recipe.clip_group)
    chosen = torch.linspace(0, clip.frames - 1, min(columns, clip.frames)).round().long()
    mean, std = recipe.augmentation.mean, recipe.augmentation.std
    planned = describe_batch(train, sampler, clip, step - 1)
    clips: list[ReplayedClip] = []
    total = torch.zeros((), dtype=torch.int64, device=options.device)
    loader = train_loader(
        train, sampler, clip, mean=mean, std=std, micro_batch=micro_batch, rank=0, world_size=1,
        first_step=step - 1, options=options, mixing=mixing(recipe),
    )  # fmt: skip
    with closing(loader):
        for batch in loader:
            total += batch.hash()
            for pixels, valid in zip(batch.clips, batch.valid.tolist(), strict=True):
                is_shown = len(clips) < shown
                frames = denormalise(pixels[:, chosen], mean, std) if is_shown else torch.empty(0)
                clips.append(ReplayedClip(next(planned), valid, frames, tuple(chosen.tolist())))
            if making is not None:
                making(len(clips), sampler.global_batch)
            if len(clips) == sampler.global_batch:
                break
    return tuple(clips), format_hash(*split_halves(total).tolist())


def _micro_batch(global_batch: int, group: int) -> int:
    """The largest divisor of the batch up to `_MICRO_BATCH` that is a multiple of the group of clips."""
    counts = range(max(_MICRO_BATCH, group), 0, -1)
    return next(count for count in counts if global_batch % count == 0 and count % group == 0)


def _differences(folder: RunDir, done: ReplayedStep, device: torch.device) -> tuple[str, ...]:
    """Known differences from the run, as text."""
    recorded = done.recorded
    assert recorded is not None  # there is a hash to compare with
    found = []
    if recorded.device is not None and recorded.device != device.type:
        found.append(
            f"the run made its clips on {recorded.device}, this is {device.type}: decoders and augmentation "
            "round differently"
        )
    found += _changed_environment(read_json(folder.environment), describe_environment())
    unreadable = [clip.planned.path for clip in done.clips if not clip.valid]
    found += [f"{path} cannot be read here" for path in unreadable]
    found += _newer_videos(done, recorded)
    if not found:
        found.append("no difference was found: recipe.yaml may have changed after this step")
    return tuple(found)


def _changed_environment(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    packages = then.get("packages")
    found = []
    for name in ("nvidia-dali-cuda120", "av", "numpy"):  # the packages that make a clip
        before = packages.get(name) if isinstance(packages, dict) else None
        if before is not None and before != now["packages"].get(name):
            found.append(f"{name} {before} at the run's latest start, {now['packages'].get(name)} here")
    for name in ("commit", "cpu", "gpus"):
        if name in then and then[name] != now[name]:
            found.append(f"{name} {then[name]} at the run's latest start, {now[name]} here")
    return found


def _newer_videos(done: ReplayedStep, recorded: StepRecord) -> list[str]:
    """Videos that were written after the step."""
    found = []
    for path in dict.fromkeys(clip.planned.path for clip in done.clips if clip.valid):
        try:
            changed = Path(path).stat().st_mtime
        except OSError:
            continue  # a path that is printed with escapes
        if recorded.time is not None and changed > recorded.time:
            found.append(f"{path} was written after the step")
    return found
