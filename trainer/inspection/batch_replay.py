"""Any training step's clips, made once more from the run's recipe, manifests and seed."""

import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines.augment.params import TrainClipSpec
from pipelines.autotune import LoaderOptions
from pipelines.batch_contents import ClipDescription, describe_batch
from pipelines.dataset.concat import Dataset
from pipelines.dataset.manifest import Manifest
from pipelines.loader import train_loader
from pipelines.sampling.sampler import TrainSampler
from trainer.checkpoint.metadata import CheckpointError, read_state
from trainer.checkpoint.retention import Retention
from trainer.config.load import load_recipe
from trainer.config.schema import Recipe
from trainer.distributed.batch_hash import format_hash, hash_clips, split_halves
from trainer.distributed.environment import describe_environment
from trainer.errors import RunError
from trainer.inspection.step_record import StepRecord, find_step
from trainer.monitoring.run_dir import RunDir
from trainer.setup.preparation import model_config, resolve_flip, train_clip, train_sampler

_MICRO_BATCH = 8  # clips made at once; what is in them does not depend on it

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class ReplayedClip:
    """planned: who it is and what is done to it. frames: some of its frames as uint8 RGB, (F, H, W, 3), and
    columns: which of the clip's frames they are; none of a clip that is not to be shown. valid: whether its
    video could be read.
    """

    planned: ClipDescription
    valid: bool
    frames: Tensor
    columns: tuple[int, ...]


@dataclass(frozen=True)
class ReplayedStep:
    """A step's clips in the order of the global batch, and the hash of all of them.

    recorded: what the run recorded of the step, None where that is gone. notes: what may make the clips
    others than the run's.
    """

    step: int
    clips: tuple[ReplayedClip, ...]
    class_names: tuple[str, ...]
    batch_hash: str
    recorded: StepRecord | None
    notes: tuple[str, ...]

    @property
    def equal(self) -> bool | None:
        """Whether the hash is the recorded one; None where none was recorded."""
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
    searching: Progress | None = None,
    making: Progress | None = None,
) -> ReplayedStep:
    """Make the clips of `step`, counted from 1 as in the run's messages, with the training loader.

    shown: how many clips keep up to `columns` frames to be shown; all are made and hashed. manifests: where
    the training manifests are now, in the recipe's order; those that the recipe names by default. searching,
    making: told of bytes of events read, and of clips made, out of all.

    Raises RunError for a folder that holds no run, a step that the run does not have, and a manifest that is
    not the one which the run had; RecipeError and DataError for a recipe or manifest that cannot be read.
    """
    recipe = _recipe(folder, manifests)
    _check_step(folder, recipe, step)
    recorded = find_step(folder.events, step, searching) if folder.events.exists() else None
    train = Dataset([Manifest.open(part.manifest) for part in recipe.data.train_manifests])
    notes = _check_manifests(folder, recipe, train, recorded)
    sampler = train_sampler(recipe, train)
    flip, _ = resolve_flip(recipe, train.class_names)
    clip = train_clip(recipe, model_config(recipe, len(train.class_names)), flip)
    share = folder.read_graph_share()
    options = LoaderOptions(device=device, decoder=recipe.data.decoder, prefetch=1, graph_share=share)
    if options.splits and share is None:
        notes += (f"{folder.decoding} does not say how decoding was split; it is measured anew here",)
    clips, batch_hash = _make(train, sampler, clip, recipe, step, options, shown, columns, making)
    done = ReplayedStep(step, clips, train.class_names, batch_hash, recorded, notes)
    if done.equal is False:
        return ReplayedStep(
            step,
            clips,
            train.class_names,
            batch_hash,
            recorded,
            (*notes, *_differences(folder, done, device)),
        )
    return done


def _recipe(folder: RunDir, manifests: Sequence[Path]) -> Recipe:
    if not folder.recipe.is_file():
        raise RunError(f"{folder.path} holds no run: {folder.recipe.name} is not there; name a run's folder")
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
    """Raises RunError, naming the manifest, where one is not the one that the run had."""
    now = [manifest.fingerprint for manifest in train.manifests]
    paths = [part.manifest for part in recipe.data.train_manifests]
    mend = "its clips would be others. Name the run's own manifest with --train"
    if recorded is not None and recorded.manifests is not None:
        if len(recorded.manifests) != len(now):
            raise RunError(
                f"the run trained on {len(recorded.manifests)} manifests; its recipe names {len(now)}"
            )
        for path, fingerprint, (_, then) in zip(paths, now, recorded.manifests, strict=True):
            if fingerprint != then:
                raise RunError(
                    f"{path} has the fingerprint {fingerprint[:16]}, and had {then[:16]} in the run: {mend}"
                )
        return ()
    before = _fingerprint_of_checkpoints(folder)
    if before is None:
        return (f"{folder.path} does not say which manifests it trained on: they are taken to be the same",)
    if train.fingerprint != before:
        raise RunError(
            f"{train} has the fingerprint {train.fingerprint[:16]}, and had {before[:16]} in the run: {mend}"
        )
    return ()


def _fingerprint_of_checkpoints(folder: RunDir) -> str | None:
    """Of the whole training set, as the newest readable checkpoint has it."""
    for path in reversed(Retention(folder.checkpoints, keep_last=1, keep_best=False).visible()):
        try:
            found = read_state(path).settings.get("data.train (fingerprint)")
        except CheckpointError:
            continue  # the one before says the same
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
    micro_batch = _micro_batch(sampler)
    chosen = torch.linspace(0, clip.frames - 1, min(columns, clip.frames)).round().long()
    mean, std = recipe.augmentation.mean, recipe.augmentation.std
    planned = describe_batch(train, sampler, clip, step - 1)
    clips: list[ReplayedClip] = []
    total = torch.zeros((), dtype=torch.int64, device=options.device)
    loader = train_loader(
        train, sampler, clip, mean=mean, std=std, micro_batch=micro_batch, rank=0, world_size=1,
        first_step=step - 1, options=options,
    )  # fmt: skip
    with closing(loader):
        for batch in loader:
            total += hash_clips(batch)
            for pixels, valid in zip(batch.clips, batch.valid.tolist(), strict=True):
                is_shown = len(clips) < shown
                frames = _visible(pixels[:, chosen], mean, std) if is_shown else torch.empty(0)
                clips.append(ReplayedClip(next(planned), valid, frames, tuple(chosen.tolist())))
            if making is not None:
                making(len(clips), sampler.global_batch)
            if len(clips) == sampler.global_batch:
                break
    return tuple(clips), format_hash(*split_halves(total).tolist())


def _micro_batch(sampler: TrainSampler) -> int:
    """The most clips up to `_MICRO_BATCH` that divide the batch without parting a sample's repeats."""
    fitting = (
        count
        for count in range(max(_MICRO_BATCH, sampler.repeats), 0, -1)
        if sampler.global_batch % count == 0 and count % sampler.repeats == 0
    )
    return next(fitting)


def _visible(frames: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:  # 3 F H W -> F H W 3
    mean_of, std_of = (torch.tensor(values, device=frames.device) for values in (mean, std))
    levels = frames.permute(1, 2, 3, 0) * std_of + mean_of
    return (levels * 255).round().clamp(0, 255).to(torch.uint8).cpu()


def _differences(folder: RunDir, done: ReplayedStep, device: torch.device) -> tuple[str, ...]:
    """What is known to be otherwise than in the run, in words."""
    recorded = done.recorded
    assert recorded is not None  # there is a hash to compare with
    found = []
    if recorded.device is not None and recorded.device != device.type:
        found.append(
            f"the run made its clips on {recorded.device}, this is {device.type}: decoders and augmentation "
            "round otherwise there"
        )
    try:
        then = json.loads(folder.environment.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        then = {}
    found += _changed_environment(then if isinstance(then, dict) else {}, describe_environment())
    unreadable = [clip.planned.path for clip in done.clips if not clip.valid]
    found += [f"{path} cannot be read here" for path in unreadable]
    found += _newer_videos(done, recorded)
    if not found:
        found.append("nothing is known that would explain it: recipe.yaml may have changed after this step")
    return tuple(found)


def _changed_environment(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    packages = then.get("packages")
    found = []
    for name in ("nvidia-dali-cuda120", "av", "numpy"):  # what makes a clip
        before = packages.get(name) if isinstance(packages, dict) else None
        if before is not None and before != now["packages"].get(name):
            found.append(f"{name} {before} at the run's latest start, {now['packages'].get(name)} here")
    for name in ("commit", "cpu", "gpus"):
        if name in then and then[name] != now[name]:
            found.append(f"{name} {then[name]} at the run's latest start, {now[name]} here")
    return found


def _newer_videos(done: ReplayedStep, recorded: StepRecord) -> list[str]:
    """Videos that were written after the step was done."""
    found = []
    for path in dict.fromkeys(clip.planned.path for clip in done.clips if clip.valid):
        try:
            changed = Path(path).stat().st_mtime
        except OSError:
            continue  # a path that is shown with escapes, not as it is
        if recorded.time is not None and changed > recorded.time:
            found.append(f"{path} was written after the step")
    return found
