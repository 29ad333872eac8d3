"""Resolves a recipe before anything is built: manifests, model, batch plan, augmentation, resume settings."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from models import UniFormerV2Config, build_config
from models.fp8 import MULTIPLE
from pipelines.augment.flip_labels import mirrored_classes
from pipelines.augment.mixing import MixingSpec
from pipelines.augment.params import TrainClipSpec, ViewSpec
from pipelines.dali.encoded_input import GraphDecoder
from pipelines.dataset.concat import Dataset, check_same_classes
from pipelines.dataset.manifest import Manifest
from pipelines.errors import VideoError
from pipelines.sampling.sampler import Part, TrainSampler
from trainer.checkpoint.metadata import WEIGHTS, TrainState
from trainer.config.schema import AugmentationSection, OptimisationSection, Recipe
from trainer.distributed.manifest_cache import open_manifest
from trainer.engine.batch_plan import BatchPlan, EarlierPlan, choose_batch_plan
from trainer.engine.memory_estimate import AvailableMemory
from trainer.errors import RecipeError, RunError
from trainer.inference.preprocessing import Preprocessing
from trainer.setup.plan_notes import memory_notes
from trainer.system.device import choose_precision

_NAMED = 4
"""Number of classes that a note names."""

BATCH_NORM_CLIPS = "clips that a batch norm sees (engine.micro_batch x ranks)"
"""The one setting of `resume_settings` that depends on the machine."""

_ADDED: dict[str, Any] = {
    "mixup": 0.0, "cutmix": 0.0, "mix_probability": 1.0, "random_erasing": 0.0,
    "label_smoothing": 0.0, "reference_batch": None, "max_short_side": None,
}  # fmt: skip
"""Fields that checkpoints of earlier versions lack, with the values that compute the same as those did."""

CHECKED_VIDEOS = 1000  # videos, evenly over the data set, whose codec `check_decoder` reads


@dataclass(frozen=True)
class Preparation:
    """A resolved recipe: the data, the model's configuration and the batch plan."""

    train: Dataset
    val: Dataset
    config: UniFormerV2Config
    sampler: TrainSampler
    layout: BatchPlan
    """How the global batch is divided over the devices."""
    train_clip: TrainClipSpec
    view_clip: ViewSpec
    notes: tuple[str, ...]
    """Differences from the recipe and values chosen for `auto`, with reasons; logged when the run starts."""


def prepare(
    recipe: Recipe,
    world_size: int,
    available: AvailableMemory,
    node_copy: Path | None = None,
    resumed: TrainState | None = None,
) -> Preparation:
    """Open the manifests, and check that data, model, batch and memory fit together.

    available: the smallest memory of any rank. node_copy: folder with the copies of the manifests that
    `manifest_cache.prefetch_manifests` made; the copies are opened instead of the manifests. resumed: of the
    checkpoint that is resumed, whose batch plan is kept.

    Raises UserError, DataError or ModelError where they do not fit.
    """
    *train_manifests, val_manifest = [
        open_manifest(path, node_copy) for _, path in recipe.data.manifest_fields
    ]
    train, val = Dataset(train_manifests), Dataset([val_manifest])
    check_same_classes(train.manifests[0], val.manifests[0])
    config = model_config(recipe, len(train.class_names))
    if len(train.class_names) > config.num_classes:
        raise RunError(
            f"{train} has {len(train.class_names)} classes, the model {config.num_classes}; set "
            f"model.num_classes to {len(train.class_names)}, or to null"
        )
    precision = choose_precision(recipe.engine.precision, torch.device(available.kind))
    layout = choose_batch_plan(
        recipe,
        config,
        world_size,
        precision=precision,
        available=available,
        earlier=_earlier_plan(resumed, config, world_size),
    )
    config = model_config(recipe, len(train.class_names), layout.recomputed_blocks)
    flip, notes = resolve_flip(recipe, train.class_names)
    return Preparation(
        train,
        val,
        config,
        train_sampler(recipe, train),
        layout,
        train_clip(recipe, config, flip),
        ViewSpec(
            config.frames,
            config.resolution,
            recipe.evaluation.clips,
            recipe.evaluation.crops,
            recipe.augmentation.max_short_side,
        ),
        (*notes, *embedded_size_notes(recipe, train, val), *layout.why, *memory_notes(layout)),
    )


def _earlier_plan(state: TrainState | None, config: UniFormerV2Config, world_size: int) -> EarlierPlan | None:
    """What to keep of the plan that wrote a checkpoint. With another number of ranks, whose roundings differ
    anyway, that is the number of clips that a batch norm sees."""
    if state is None:
        return None
    if state.micro_batch is not None and state.world_size == world_size:
        reason = "as in the checkpoint, for equal results"
        return EarlierPlan(state.micro_batch, state.zero_stage, reason)
    clips = state.settings.get(BATCH_NORM_CLIPS)
    if config.has_batch_norm and isinstance(clips, int) and clips % world_size == 0:
        reason = f"with which a batch norm sees {clips} clips, as before"
        return EarlierPlan(clips // world_size, None, reason)
    return None


def model_config(recipe: Recipe, data_classes: int, recomputed_blocks: int = 0) -> UniFormerV2Config:
    """The configuration of the recipe's model.

    data_classes: number of classes of the data, the default of `model.num_classes`. recomputed_blocks: number
    of blocks with activation recomputation. Raises RecipeError or ModelError for an invalid configuration.
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
    overrides: dict[str, Any] = {**model.overrides, "recomputed_blocks": recomputed_blocks}
    classes = model.num_classes or data_classes
    config = build_config(
        model.preset,
        form=model.form,
        frames=model.frames,
        num_classes=classes,
        backbone=model.backbone,
        **overrides,
    )
    short_side = recipe.augmentation.max_short_side
    if short_side is not None and short_side < config.resolution:
        raise RecipeError(
            f"augmentation.max_short_side: {short_side} is less than the model's resolution, "
            f"{config.resolution}; set it to {config.resolution} or more, or to null"
        )
    if recipe.engine.fp8:
        for name, size in (("width", config.width), ("width x mlp_ratio", config.mlp_width)):
            if size % MULTIPLE:
                raise RecipeError(
                    f"engine.fp8: the model's {name} is {size}, and products in FP8 need multiples of "
                    f"{MULTIPLE}; change it in model.overrides, or set engine.fp8 to false"
                )
    return config


def train_sampler(recipe: Recipe, train: Dataset) -> TrainSampler:
    """The sampler of the training set."""
    batch, repeats = recipe.optimisation.global_batch, recipe.sampling.repeats
    parts = train_manifests(train.manifests, _ratios(recipe))
    return TrainSampler(len(train), batch, recipe.seed, repeats, recipe.sampling.shuffle, parts)


def train_manifests(manifests: Sequence[Manifest], ratios: Sequence[float] | None) -> tuple[Part, ...]:
    """The parts that the sampler mixes; empty where each epoch is one permutation of all videos.

    Without ratios, and if any manifest has weights, the ratios are the numbers of videos: all parts finish an
    epoch at the same time.
    """
    if ratios is None:
        if not any(manifest.weighted for manifest in manifests):
            return ()
        ratios = [len(manifest) for manifest in manifests]
    return tuple(
        Part(len(manifest), ratio, manifest if manifest.weighted else None)
        for manifest, ratio in zip(manifests, ratios, strict=True)
    )


def embedded_size_notes(recipe: Recipe, train: Dataset, val: Dataset) -> tuple[str, ...]:
    """A note where the numbers of clips of the rendered data set differ from the recipe."""
    embedded = recipe.data.embedded
    if embedded is None or (len(train), len(val)) == (embedded.train_clips, embedded.val_clips):
        return ()
    folder = recipe.data.val.parent
    note = (
        f"{folder} holds {len(train):,} training and {len(val):,} validation clips, rendered before; the "
        f"recipe asks for {embedded.train_clips:,} and {embedded.val_clips:,}. Delete the folder to render "
        "it again"
    )
    return (note,)


def resolve_flip(recipe: Recipe, class_names: Sequence[str]) -> tuple[float, tuple[str, ...]]:
    """The probability of a horizontal flip, and a note where it differs from the recipe.

    Where class names contain left or right, a flipped clip has the wrong label; it is then not flipped.
    """
    augmentation = recipe.augmentation
    mirrored = mirrored_classes(class_names)
    if augmentation.flip == 0 or augmentation.flip_left_right or not mirrored:
        return augmentation.flip, ()
    named = ", ".join(mirrored[:_NAMED]) + (", ..." if len(mirrored) > _NAMED else "")
    note = (
        f"clips are not flipped, although augmentation.flip is {augmentation.flip:g}: {len(mirrored)} of the "
        f"classes distinguish left from right ({named}), and a flipped clip would have the wrong label. Set "
        "augmentation.flip to 0 to silence this, or augmentation.flip_left_right to true to flip anyway"
    )
    return 0.0, (note,)


def check_decoder(recipe: Recipe, train: Dataset, *, gpu: bool) -> None:
    """With `data.decoder: dali`, check that DALI decodes the codecs of a sample of the videos.

    Raises RunError when the share of other codecs is above data.bad_share.
    """
    if recipe.data.decoder != "dali":
        return
    known = GraphDecoder.for_device(gpu=gpu).codecs
    checked = range(0, len(train), max(1, len(train) // CHECKED_VIDEOS))
    others: Counter[str] = Counter()
    for sample in checked:
        with suppress(VideoError):  # a bad row is a bad video for every decoder
            codec = train.row(sample).codec
            others[codec] += codec not in known
    others = +others
    if others.total() > recipe.data.bad_share * len(checked):
        named = ", ".join(f"{count} {codec}" for codec, count in others.most_common())
        raise RunError(
            f"data.decoder: dali decodes {', '.join(sorted(known))} on a {'GPU' if gpu else 'CPU'}, and of "
            f"{len(checked)} training videos {others.total()} are not ({named}); set it to "
            f"{'auto or hybrid' if gpu else 'pyav or hybrid'}"
        )


def resume_settings(recipe: Recipe, prepared: Preparation) -> dict[str, Any]:
    """The settings that may not change when a run is resumed, by their names in the recipe, as JSON values.

    These settings change results by more than rounding. Distribution, measurement, logging and saving may
    change. `checkpoint.weights_origin` compares the weights that the training started from.
    """
    sampler, layout = prepared.sampler, prepared.layout
    augmentation = _without_unused(recipe.augmentation)
    del augmentation["flip_left_right"]  # its effect is in the resolved flip
    optimisation = _without_unused(recipe.optimisation)
    del optimisation["skipped_steps"]  # when to stop, not what to compute
    config = dataclasses.asdict(prepared.config)
    del config["recomputed_blocks"]  # changes memory and time only
    named = {name: config.pop(name) for name in ("frames", "num_classes")}
    values = {
        "seed": recipe.seed,
        WEIGHTS: None
        if recipe.model.weights is None
        else {"file": str(recipe.model.weights), "sha256": None},
        **_under("model", named),
        **_under("model.overrides", config),
        "data.train (fingerprint)": prepared.train.fingerprint,
        "data.train (ratios)": _ratios(recipe),
        "data.train (class names)": prepared.train.class_names,
        **_under("sampling", recipe.sampling.model_dump(mode="json")),
        **_under("augmentation", {**augmentation, "flip": prepared.train_clip.flip}),
        **_under("optimisation", optimisation),
    }
    if prepared.config.has_batch_norm:
        values[BATCH_NORM_CLIPS] = sampler.global_batch // layout.accumulation
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _under(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    return {f"{prefix}.{name}": value for name, value in values.items()}


def _without_unused(section: AugmentationSection | OptimisationSection) -> dict[str, Any]:
    """The fields, without those that earlier versions did not have where they have no effect."""
    values = section.model_dump(mode="json")
    return {name: value for name, value in values.items() if name not in _ADDED or value != _ADDED[name]}


def preprocessing(recipe: Recipe, config: UniFormerV2Config) -> dict[str, Any]:
    """The preprocessing of a video for the model; stored with the weights."""
    return Preprocessing(
        config.frames,
        config.resolution,
        recipe.augmentation.mean,
        recipe.augmentation.std,
        recipe.evaluation.clips,
        recipe.evaluation.crops,
        recipe.augmentation.max_short_side,
    ).as_metadata()


def _ratios(recipe: Recipe) -> list[float] | None:
    """The ratios of the training manifests; None where the recipe has none."""
    ratios = [part.ratio for part in recipe.data.train_manifests if part.ratio is not None]
    return ratios or None


def mixing(recipe: Recipe) -> MixingSpec | None:
    """Mixup, CutMix and random erasing; None without."""
    augmentation = recipe.augmentation
    spec = MixingSpec(
        mixup=augmentation.mixup,
        cutmix=augmentation.cutmix,
        probability=augmentation.mix_probability,
        erasing=augmentation.random_erasing,
    )
    return spec if spec.mixes or spec.erasing else None


def train_clip(recipe: Recipe, config: UniFormerV2Config, flip: float) -> TrainClipSpec:
    """Sampling and augmentation of a training clip. flip: probability from `resolve_flip`."""
    augmentation = recipe.augmentation
    return TrainClipSpec(
        frames=config.frames,
        size=config.resolution,
        crop_scale=augmentation.crop_scale,
        crop_ratio=augmentation.crop_ratio,
        flip=flip,
        color_jitter=augmentation.color_jitter,
        rand_augment=augmentation.rand_augment,
        max_short_side=augmentation.max_short_side,
    )
