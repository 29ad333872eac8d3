"""What must be right before anything is built: manifests, model, batch, and how they fit together."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import UniFormerV2Config, build_config
from pipelines import DataError, rand_augment
from pipelines.draw import TrainClip, ViewClip
from pipelines.manifest import Manifest
from pipelines.plan import TrainPlan
from trainer import RecipeError, RunError
from trainer.batch_split import split_batch
from trainer.recipe import Recipe


@dataclass(frozen=True)
class Preparation:
    """train, val: the manifests. micro_batch, accumulation: how a rank works through its share of a batch."""

    train: Manifest
    val: Manifest
    config: UniFormerV2Config
    plan: TrainPlan
    micro_batch: int
    accumulation: int
    train_clip: TrainClip
    view_clip: ViewClip


def prepare(recipe: Recipe, world_size: int) -> Preparation:
    """Open the manifests and check that data, model and batch fit together.

    Raises UserError, DataError or ModelError for what does not.
    """
    train, val = (_open(path) for path in (recipe.data.train, recipe.data.val))
    if train.class_names != val.class_names:
        raise RunError(
            f"{recipe.data.train} and {recipe.data.val} name different classes ({len(train.class_names)} and "
            f"{len(val.class_names)}); make both manifests with the same class list"
        )
    config = model_config(recipe, len(train.class_names))
    if len(train.class_names) > config.num_classes:
        raise RunError(
            f"{recipe.data.train} has {len(train.class_names)} classes, the model {config.num_classes}; set "
            f"model.num_classes to {len(train.class_names)}, or to null"
        )
    batch, repeats = recipe.optimisation.global_batch, recipe.sampling.repeats
    micro_batch, accumulation = split_batch(batch, world_size, recipe.engine.micro_batch, repeats)
    return Preparation(
        train,
        val,
        config,
        TrainPlan(len(train), batch, recipe.seed, repeats, recipe.sampling.shuffle),
        micro_batch,
        accumulation,
        _train_clip(recipe, config),
        ViewClip(config.frames, config.resolution, recipe.evaluation.clips, recipe.evaluation.crops),
    )


def model_config(recipe: Recipe, data_classes: int) -> UniFormerV2Config:
    """The model that the recipe describes, for data of so many classes.

    Raises RecipeError or ModelError for a model that cannot be.
    """
    model = recipe.model
    places = {
        "frames": "model.frames",
        "num_classes": "model.num_classes",
        "recomputed_blocks": "engine.recomputed_blocks",
    }
    for name, place in places.items():
        if name in model.overrides:
            raise RecipeError(f"model.overrides.{name}: set {place} instead")
    overrides: dict[str, Any] = {**model.overrides, "recomputed_blocks": recipe.engine.recomputed_blocks}
    classes = model.num_classes or data_classes
    return build_config(model.preset, form=model.form, frames=model.frames, num_classes=classes, **overrides)


def settled(recipe: Recipe, prepared: Preparation) -> dict[str, Any]:
    """What may not change while a run goes on, by name: the model, the data and their order."""
    plan = prepared.plan
    config = dataclasses.asdict(prepared.config)
    del config["recomputed_blocks"]  # changes memory and time only
    return {
        "seed": recipe.seed,
        "data.train (fingerprint)": prepared.train.fingerprint,
        "optimisation.global_batch": plan.global_batch,
        "sampling.repeats": plan.repeats,
        "sampling.shuffle": plan.shuffle,
        **{f"model {name}": list(v) if isinstance(v, tuple) else v for name, v in config.items()},
    }


def preprocessing(recipe: Recipe, config: UniFormerV2Config) -> dict[str, Any]:
    """What must be done to a video before the model sees it; travels with the weights."""
    return {
        "frames": config.frames,
        "resolution": config.resolution,
        "sampling": "sparse",
        "mean": list(recipe.augmentation.mean),
        "std": list(recipe.augmentation.std),
    }


def _train_clip(recipe: Recipe, config: UniFormerV2Config) -> TrainClip:
    augmentation = recipe.augmentation
    if augmentation.rand_augment is not None:
        rand_augment.parse(augmentation.rand_augment)
    return TrainClip(
        frames=config.frames,
        size=config.resolution,
        crop_scale=augmentation.crop_scale,
        crop_ratio=augmentation.crop_ratio,
        flip=augmentation.flip,
        color_jitter=augmentation.color_jitter,
        rand_augment=augmentation.rand_augment,
    )


def _open(path: Path) -> Manifest:
    manifest = Manifest.open(path)
    if len(manifest) == 0:
        raise DataError(f"{path} lists no video")
    for end in (0, len(manifest) - 1):
        manifest.row(end)  # a damaged file shows here, and not first in a worker process
    return manifest
