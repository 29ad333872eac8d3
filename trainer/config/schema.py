"""The schema of a recipe: every field with its type, range, default and meaning.

A `Recipe` is frozen and holds every value that the run uses, defaults included. `load.load_recipe` makes one
from YAML files and overrides. `docs/recipes.md` is generated from the docstrings of sections and fields.
"""

import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    JsonValue,
    field_validator,
    model_validator,
)

from pipelines.augment import rand_augment
from pipelines.errors import DataError
from trainer.config.data_section import DataSection
from trainer.config.section import Section
from trainer.config.value_types import (
    MIN_RATE,
    AspectRatio,
    Clips,
    Decay,
    Deviation,
    Epochs,
    FieldError,
    FilePath,
    Mean,
    Minutes,
    Rate,
    RegisteredModel,
    RunName,
    SaveMinutes,
    Seed,
    Share,
    Steps,
    Text,
    check_finite,
)
from trainer.config.yaml import dump_yaml
from trainer.secrets import Address

Scalar = str | int | float | bool | None
ALTERNATIVES = (
    ("optimisation", "epochs", "steps"),
    ("optimisation", "warmup_epochs", "warmup_steps"),
    ("evaluation", "every_epochs", "every_steps"),
)
"""(section, field, field): one quantity in two units; at most one may have a value."""

_MAX_MAGNITUDE = 100  # of RandAugment; common are 0 to 10

ENGINE_AUTO = {"zero_stage": "auto", "micro_batch": "auto", "recomputed_blocks": "auto"}
"""The meaning of `engine: auto`."""


class ModelSection(Section):
    """The model."""

    preset: Literal["tiny", "b16", "l16", "l14", "l14_336"]
    """Size of the image ViT: a small one for tests, B/16, L/16, L/14, or L/14 at 336 pixels."""

    backbone: Literal["clip", "supervised", "deit3", "dino", "mae", "beit"] = "clip"
    """Image ViT that the model is built on (table 8). All but CLIP's have GELU and no norm before the blocks;
    DeiT III and BEiT have layer scale, and BEiT has relative positions and averages its patches."""

    form: Literal["scene", "temporal"]
    """`scene` has global blocks only (Kinetics, MiT); `temporal` adds doubled local temporal blocks and
    temporal downsampling (Something-Something)."""

    frames: Annotated[int, Field(ge=1, le=4096)]
    """Frames per clip, sampled sparsely over the whole video."""

    num_classes: Annotated[int, Field(ge=1, le=10**6)] | None = None
    """Classes of the head; null takes their number from the training manifest."""

    weights: FilePath | None = None
    """File of weights to start from: an image ViT's (of `backbone`), an export of this program
    (`weights.safetensors`), or a released UniFormerV2 checkpoint; null starts from random weights."""

    inflation: Literal["centre", "mean"] = "centre"
    """Where a patch embedding over 3 frames gets the weights of one over a single frame: the middle frame, or
    a third in each."""

    overrides: dict[str, JsonValue] = {}  # noqa: RUF012 - pydantic copies it
    """Fields of the model to set beside the preset's and the form's, see below."""

    @model_validator(mode="before")
    @classmethod
    def _without_an_empty_old_field(cls, value: Any) -> Any:
        """Recipes in run directories of earlier versions hold `image_weights: null`."""
        if isinstance(value, dict) and value.get("image_weights", "") is None:
            return {name: found for name, found in value.items() if name != "image_weights"}
        return value

    @field_validator("overrides")
    @classmethod
    def _fields_of_a_model(cls, value: dict[str, JsonValue]) -> dict[str, JsonValue]:
        if value:
            from models.config import (  # imports PyTorch, so only where needed
                ModelError,
                check_field,
                check_field_name,
            )

            for name, found in value.items():
                try:
                    check_field_name(name)
                    check_field(name, found)
                except ModelError as error:
                    raise FieldError((name,), str(error)) from None
                check_finite(found, (name,))
        return value

    @model_validator(mode="after")
    def _overrides_fit_the_preset(self) -> Self:
        if self.overrides:
            from models.config import ModelError, build_config, is_field

            set_elsewhere = {"frames", "num_classes"}  # refused when the model is prepared
            if all(is_field(name) and name not in set_elsewhere for name in self.overrides):
                classes = self.num_classes or 1  # or more: the manifest has the number
                try:
                    build_config(
                        self.preset,
                        form=self.form,
                        frames=self.frames,
                        num_classes=classes,
                        backbone=self.backbone,
                        **self.overrides,
                    )
                except ModelError as error:
                    raise FieldError(self._wrong_field(str(error)), str(error)) from None
        return self

    def _wrong_field(self, message: str) -> tuple[str, ...]:
        """The field that an error of the model configuration names, or all overrides."""
        name, verb, _ = message.partition(" is ")
        if verb and name in self.overrides:
            return "overrides", name
        return ("frames",) if verb and name == "frames" else ("overrides",)


class SamplingSection(Section):
    """Which clips are in a batch."""

    repeats: Annotated[int, Field(ge=1, le=1024)] = 1
    """Repeated sampling: how many augmentations of each decoded clip enter the same global batch."""

    shuffle: bool = True
    """Draw a new order of the training clips every epoch."""


class AugmentationSection(Section):
    """The augmentation of a training clip; all frames of a clip have the same parameters."""

    crop_scale: tuple[Annotated[float, Field(ge=1e-4)], Annotated[float, Field(ge=1e-4)]] = (0.08, 1.0)
    """Smallest and largest area of the random crop, as a share of the frame's area."""

    crop_ratio: tuple[AspectRatio, AspectRatio] = (0.75, 1.3333)
    """Smallest and largest aspect ratio (width / height) of the random crop."""

    flip: Share = 0.5
    """Probability of a horizontal flip; 0 where labels distinguish left and right."""

    flip_left_right: bool = False
    """Flip although the names of the classes distinguish left and right, such as `move_left` and
    `move_right`; by default such data are not flipped, and the run logs that."""

    color_jitter: Share = 0.0
    """Strength of random brightness, contrast and saturation; 0 is none."""

    rand_augment: Text | None = None
    """RandAugment in timm's form, such as `rand-m7-n4-mstd0.5-inc1`: m magnitude, n operations per clip, mstd
    spread of the magnitude (above 100: uniform from 0 to m), mmax largest magnitude (10), p chance of each
    operation (0.5), and inc1 (operations that grow with the magnitude), which is required; null is none."""

    mixup: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Alpha of mixup: pairs of clips of the batch are averaged with a weight from Beta(alpha, alpha), and so
    are their labels; 0 is none, 0.8 is usual."""

    cutmix: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Alpha of CutMix: a box of the clip, in all frames, comes from the other clip of a pair, and a share of
    the label with it; 0 is none, 1 is usual. With `mixup`, each pair takes either with probability one half.
    """

    mix_probability: Share = 1.0
    """Probability that a pair of clips is mixed by `mixup` or `cutmix`."""

    random_erasing: Share = 0.0
    """Probability that a box of 2 to 33 % of the clip, the same in all frames, is set to the mean colour;
    0.25 is usual."""

    max_short_side: Annotated[int, Field(ge=1, le=16384)] | None = None
    """Scale frames whose short side has more pixels down to it when they are decoded, in training and in
    evaluation, as if the videos had been stored at this size; 320 is usual for crops of 224. It saves memory
    and time of videos of 720 lines and more. At least the model's resolution; null keeps the size."""

    mean: tuple[Mean, Mean, Mean] = (0.45, 0.45, 0.45)
    """Subtracted from red, green and blue of a pixel scaled to 0..1."""

    std: tuple[Deviation, Deviation, Deviation] = (0.225, 0.225, 0.225)
    """Divides red, green and blue after the mean was subtracted."""

    @field_validator("crop_scale", "crop_ratio")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError(f"the first of the two may not be larger than the second, found {list(value)}")
        return value

    @field_validator("rand_augment")
    @classmethod
    def _parsed(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                policy = rand_augment.parse_policy(value)
                if max(policy.magnitude, policy.magnitude_max) > _MAX_MAGNITUDE:
                    raise DataError(f"rand_augment '{value}': m and mmax are at most {_MAX_MAGNITUDE}")
            except DataError as error:
                raise ValueError(str(error)) from error
        return value

    @field_validator("crop_scale")
    @classmethod
    def _within_the_frame(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[1] > 1:
            raise ValueError(f"a crop is at most the whole frame (1), found {value[1]:g}")
        return value


class OptimisationSection(Section):
    """AdamW, with linear warm-up and then a cosine, per step."""

    global_batch: Clips
    """Clips per optimiser step over all ranks, repeats included; the micro-batch follows from it."""

    epochs: Epochs | None = None
    """Length of the training in epochs, each as many draws as there are training videos; or give `steps`."""

    steps: Steps | None = None
    """Length of the training in optimiser steps; or give `epochs`."""

    learning_rate: Annotated[float, Field(ge=MIN_RATE, le=10)]
    """Peak learning rate, of a batch of `reference_batch` clips where that is given, else of any batch."""

    reference_batch: Clips | None = None
    """The global batch that the rates belong to: at another `global_batch`, `learning_rate`, `warmup_start`
    and `end_learning_rate` are multiplied by `global_batch` / `reference_batch`; null keeps them. The log
    says which."""

    warmup_epochs: Annotated[float, Field(ge=0, le=10**6)] | None = None
    """Length of the warm-up in epochs; or give `warmup_steps`; neither means no warm-up."""

    warmup_steps: Annotated[int, Field(ge=0, le=10**9)] | None = None
    """Length of the warm-up in optimiser steps; or give `warmup_epochs`."""

    warmup_start: Rate = 1e-6
    """Learning rate of the first step of the warm-up."""

    end_learning_rate: Rate = 1e-6
    """Learning rate at the end of the cosine."""

    weight_decay: Rate = 0.05
    """AdamW's weight decay, on tensors of two or more dimensions only."""

    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's decay rates of the first and the second moment."""

    eps: Annotated[float, Field(ge=1e-20, le=1)] = 1e-8
    """AdamW's epsilon, which keeps the division finite."""

    clip_norm: Annotated[float, Field(ge=1e-6, le=10**6)] | None = 20.0
    """Global gradient norm above which gradients are scaled down; null never clips."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of each training label that is spread evenly over all classes; 0 is none, 0.1 is usual."""

    layer_decay: Annotated[float, Field(ge=0.01, le=1)] | None = None
    """Layer-wise decay: each backbone block's learning rate is this many times that of the block after it;
    null is the same rate for all."""

    ema_decay: Annotated[float, Field(ge=0.01, lt=1)] | None = None
    """Keep an exponential moving average of the weights with this decay per step, and evaluate and export it;
    null keeps none."""

    skipped_steps: Annotated[int, Field(ge=0, le=10**6)] = 10
    """Steps that may be skipped because their loss or gradient is not finite, in all attempts of a run; one
    more stops it."""

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give exactly one of `epochs` and `steps`")
        if self.warmup_epochs is not None and self.warmup_steps is not None:
            raise ValueError("give at most one of `warmup_epochs` and `warmup_steps`")
        for length, warmup in ((self.epochs, self.warmup_epochs), (self.steps, self.warmup_steps)):
            if length is not None and warmup is not None and warmup > length:
                raise ValueError(f"the warm-up ({warmup:g}) is longer than the training ({length:g})")
        return self

    @property
    def rate_scale(self) -> float:
        """By what the learning rates are multiplied."""
        return self.global_batch / (self.reference_batch or self.global_batch)

    def total_steps(self, steps_per_epoch: float) -> int:
        """Optimiser steps of the whole training, at least 1."""
        return self.steps or max(1, round((self.epochs or 0) * steps_per_epoch))

    def total_warmup_steps(self, steps_per_epoch: float) -> int:
        """Optimiser steps of the warm-up, at most those of the whole training."""
        steps = self.warmup_steps or round((self.warmup_epochs or 0) * steps_per_epoch)
        return min(steps, self.total_steps(steps_per_epoch))


class EngineSection(Section):
    """How the work is divided over devices and memory: changes speed and memory, and results by rounding
    only. `engine: auto` means `auto` for `zero_stage`, `micro_batch` and `recomputed_blocks`."""

    zero_stage: Literal[0, 1, 2, 3, "auto"] = 1
    """What DeepSpeed partitions over the ranks: 0 nothing, 1 optimiser states, 2 gradients too, 3 weights
    too; `auto` is the lowest with which the fastest plan fits."""

    precision: Literal["auto", "fp32", "bf16", "autocast"] = "auto"
    """`bf16` keeps fp32 master weights in the optimiser, `autocast` keeps fp32 weights and multiplies
    matrices in bf16, `auto` is bf16 on a GPU and fp32 on a CPU."""

    micro_batch: Clips | Literal["auto"] | None = None
    """Most clips per rank in one forward pass; gradients are accumulated up to the global batch. null takes
    the rank's whole share at once, `auto` is that of the fastest plan that fits into the memory, on paper."""

    recomputed_blocks: Annotated[int, Field(ge=0, le=256)] | Literal["auto"] = 0
    """Backbone blocks whose activations are recomputed in the backward pass to save memory; `auto` is that of
    the fastest plan that fits."""

    fused: bool | Literal["auto"] = "auto"
    """Update all weights in one kernel, which `auto` does. Otherwise the host waits in each step to read
    whether the gradient is finite. Results differ by rounding."""

    compile: bool = False
    """Compile the model with `torch.compile`, as one graph; not with ZeRO stage 3."""

    fp8: bool = False
    """In training, compute the linear layers of the backbone's blocks with products in FP8: e4m3 for
    activations and weights, e5m2 for gradients, each tensor with a scale of its own. Weights stay what
    `precision` makes them. Needs a GPU of compute capability 8.9 or newer; a CPU computes the same, more
    slowly. It saves time with `compile` only: otherwise rounding takes kernels of its own."""

    deterministic: bool = False
    """Compute the same bits each time on a GPU, so that a resumed run equals an uninterrupted one bit for
    bit; slower. A CPU always does."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device; `auto` is a GPU where there is one."""

    @model_validator(mode="before")
    @classmethod
    def _all_auto(cls, value: Any) -> Any:
        return dict(ENGINE_AUTO) if value == "auto" else value

    @model_validator(mode="after")
    def _one_graph(self) -> Self:
        if self.compile and self.zero_stage == 3:
            raise ValueError(
                "`compile` needs `zero_stage` 0, 1 or 2: at stage 3 DeepSpeed gathers weights before each "
                "module, and compiled code would end there"
            )
        return self


class EvaluationSection(Section):
    """How accuracy is measured on the validation videos."""

    every_epochs: Epochs | None = None
    """Evaluate every so many epochs; or give `every_steps`; neither means only at the end."""

    every_steps: Steps | None = None
    """Evaluate every so many optimiser steps; or give `every_epochs`."""

    clips: Annotated[int, Field(ge=1, le=100)] = 1
    """Clips per video, at different times; the softmax is averaged over all views."""

    crops: Literal[1, 3] = 1
    """Crops per clip: 1 is the centre; 3 are left, centre and right, or top, centre and bottom."""

    batch: Annotated[int, Field(ge=1, le=4096)] = 8
    """Videos per rank and batch, each with clips x crops views; a large batch is computed in several forward
    passes."""

    at_end: bool = True
    """Evaluate once more after the last step."""

    @model_validator(mode="after")
    def _one_interval(self) -> Self:
        if self.every_epochs is not None and self.every_steps is not None:
            raise ValueError("give at most one of `every_epochs` and `every_steps`")
        return self

    def interval(self, steps_per_epoch: float) -> int | None:
        """Optimiser steps between two evaluations, at least 1; None where there are none in between."""
        if self.every_epochs is not None:
            return max(1, round(self.every_epochs * steps_per_epoch))
        return self.every_steps


class TrackingSection(Section):
    """What MLflow records."""

    enabled: bool = True
    """Record the run in MLflow."""

    uri: Annotated[Text, AfterValidator(Address)] | None = None
    """MLflow's address; null takes the environment's MLFLOW_TRACKING_URI, and without that
    `sqlite:///mlflow.db` in the current directory. A user name and a password in it are used, and not
    recorded."""

    experiment: Text = "uniformerv2"
    """MLflow experiment of the run. Where no recipe file names one, it is the name of the oldest recipe in
    the chain of bases, without files whose name begins with `_`: variants share an experiment."""

    every_steps: Steps = 10
    """Optimiser steps between two recorded values of the training metrics."""

    parent_run: Text | None = None
    """MLflow's id of the parent run, as in a sweep; null has no parent."""

    register_as: RegisteredModel | None = None
    """Upload the final weights to MLflow as a new version of this registered model: `NAME`, or `NAME@ALIAS`
    to set the alias to it. null uploads no weights."""


class RunSection(Section):
    """The run directory, checkpoints, time limits and terminal output."""

    dir: FilePath = Path("runs")
    """Folder of the run directory, which has the recipe's name."""

    checkpoint_every_steps: Steps | None = None
    """Save a checkpoint every so many optimiser steps; null does not count steps."""

    checkpoint_every_minutes: SaveMinutes | None = 15.0
    """Save a checkpoint every so many minutes; null does not count minutes."""

    keep_last: Annotated[int, Field(ge=1, le=10**6)] = 3
    """Checkpoints kept; older ones are deleted."""

    keep_best: bool = True
    """Save a checkpoint after an evaluation that is the best so far, and keep it besides the latest ones."""

    rendezvous_minutes: Minutes = 10.0
    """Minutes within which all ranks must join; otherwise the run ends, and names those that did not."""

    time_limit_minutes: Minutes | None = None
    """Save and end, to be started again, before so many minutes after the start; null has no limit but that
    of the SLURM job, from SLURM_JOB_END_TIME."""

    hang_minutes: Minutes | None = 20.0
    """End the run, to be started again, when a rank makes no progress for so many minutes, and log where each
    rank is; null waits forever."""

    log_every_steps: Steps = 10
    """Optimiser steps between two lines of output where the output is not a terminal."""


class Recipe(Section):
    """The whole configuration of a training run."""

    name: RunName
    """Name of the run and of its directory."""

    seed: Seed = 0
    """Seed of every random number: order, frames, augmentation, initial weights, dropout."""

    model: ModelSection
    data: DataSection
    sampling: SamplingSection = SamplingSection()
    augmentation: AugmentationSection = AugmentationSection()
    optimisation: OptimisationSection
    engine: EngineSection = EngineSection()
    evaluation: EvaluationSection = EvaluationSection()
    tracking: TrackingSection = TrackingSection()
    run: RunSection = RunSection()

    @model_validator(mode="after")
    def _whole_groups(self) -> Self:
        repeats = self.sampling.repeats
        if self.optimisation.global_batch % repeats:
            raise ValueError(
                f"optimisation.global_batch ({self.optimisation.global_batch}) must be a multiple of "
                f"sampling.repeats ({repeats}), so that all repeats of a clip share a batch"
            )
        if self.optimisation.global_batch % self.clip_group:
            raise ValueError(
                f"optimisation.global_batch ({self.optimisation.global_batch}) must be a multiple of "
                f"{self.clip_group}: augmentation.mixup and augmentation.cutmix mix clips in pairs"
            )
        return self

    @model_validator(mode="after")
    def _scaled_by_pyav(self) -> Self:
        if self.augmentation.max_short_side is not None and self.data.decoder == "dali":
            raise ValueError(
                "augmentation.max_short_side is applied by PyAV: set data.decoder to auto, hybrid or pyav"
            )
        return self

    @property
    def clip_group(self) -> int:
        """Consecutive clips of a global batch that a micro-batch may not divide: repeats, pairs to mix."""
        mixing = self.augmentation
        mixes = (mixing.mixup > 0 or mixing.cutmix > 0) and mixing.mix_probability > 0
        return self.sampling.repeats * (2 if mixes else 1)

    def flattened(self) -> dict[str, Scalar]:
        """Every leaf under its dotted name, such as `optimisation.betas`; lists as JSON text."""
        return dict(leaves(self.model_dump(mode="json"), ""))

    def to_yaml(self) -> str:
        """The complete recipe, without bases; loading it gives an equal recipe."""
        return dump_yaml(self.model_dump(mode="json"))


def leaves(tree: dict[str, Any], prefix: str) -> list[tuple[str, Scalar]]:
    """Every leaf of a tree under its dotted name after `prefix`; lists as JSON text."""
    found: list[tuple[str, Scalar]] = []
    for key, value in tree.items():
        if isinstance(value, dict):
            found += leaves(value, f"{prefix}{key}.")
        else:
            found.append((prefix + key, json.dumps(value) if isinstance(value, list) else value))
    return found
