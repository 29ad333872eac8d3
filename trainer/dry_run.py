"""`--check`: prints the model, cost and memory of a run, and lists what is missing on this machine."""

import math
import shutil
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import TypeVar

import torch
from rich.console import Console

from models import ModelError, UniFormerV2Config
from models.cost import (
    multiply_accumulates,
    parameter_count,
    train_step_flops,
    trainable_parameter_count,
)
from pipelines.dataset.manifest import Manifest
from pipelines.dataset.split_overlap import overlap_notes
from pipelines.errors import DataError
from pipelines.synthetic.motion import CLASS_NAMES
from trainer.checkpoint.metadata import TrainState
from trainer.checkpoint.retention import Retention
from trainer.config.schema import Recipe
from trainer.distributed.manifest_cache import open_manifest
from trainer.engine.batch_plan import BatchPlan, choose_batch_plan
from trainer.engine.memory_estimate import GIB, AvailableMemory, MemoryModel, free_bytes
from trainer.errors import RunError, UserError
from trainer.lr_schedule import Schedule
from trainer.monitoring.console import facts_table
from trainer.monitoring.run_dir import RunDir
from trainer.setup.embedded_data import check_embedded
from trainer.setup.plan_notes import fp8_notes, memory_notes, plan_change_notes
from trainer.setup.preparation import (
    BATCH_NORM_CLIPS,
    Preparation,
    check_decoder,
    model_config,
    prepare,
    preprocessing,
    resume_settings,
)
from trainer.setup.start_checks import (
    check_checkpoint,
    check_resume,
    check_run_dir,
    check_tracking,
    check_videos,
    resumed_state,
    short_side_notes,
)
from trainer.setup.starting_weights import plan_starting_weights
from trainer.system.device import check_fp8, choose_precision
from trainer.system.formatting import format_bytes, format_gmacs

T = TypeVar("T")

ASSUMED_GPU = 80 * GIB  # memory of the GPU that is assumed on a machine without one
ASSUMED_PEAK = 989e12  # FLOP/s in bf16 of an H100 SXM, from its data sheet
ASSUMED_MFU = 0.4  # share of the peak that a training is assumed to reach; not measured


class _Problems(list[str]):
    """The reasons why a run could not start, each once."""

    def attempt(self, work: Callable[[], T]) -> T | None:
        """Call `work` and return its result. On an error, note the message and return None."""
        try:
            return work()
        except (UserError, DataError, ModelError) as error:
            self.note(str(error))
            return None

    def note(self, text: str) -> None:
        if text not in self:
            self.append(text)


def check(
    recipe: Recipe,
    folder: RunDir,
    ranks: int | None = None,
    resume: str = "auto",
    allowed: Sequence[str] = (),
) -> int:
    """Print what the run would do. Returns exit code 0.

    folder: the run folder. ranks: number of ranks, by default one per GPU of this machine; with it, this
    machine needs no GPU. resume, allowed: as for `trainer.run.train`.

    Raises RunError, with all reasons, where the run could not start.
    """
    problems = _Problems()
    problems.attempt(lambda: check_tracking(recipe, folder.path))
    problems.attempt(lambda: check_run_dir(folder))
    problems.attempt(lambda: check_resume(folder, resume))
    problems.attempt(lambda: check_embedded(recipe))
    if recipe.engine.fp8 and recipe.engine.device != "cpu" and ranks is None and torch.cuda.is_available():
        problems.attempt(lambda: check_fp8(torch.device("cuda", 0)))
    available, whose = _available_memory(recipe, ranks)
    asked, ranks = ranks, ranks or max(1, torch.cuda.device_count())
    absent = [(name, path) for name, path in recipe.data.manifest_fields if not path.exists()]
    notes: list[str] = []
    prepared = None
    if not absent:
        resumed = resumed_state(folder, resume)
        prepared, notes = _prepared(recipe, ranks, available, problems, resumed)
        if prepared is not None and resumed is not None:
            notes += plan_change_notes(recipe, prepared.layout, resumed, ranks)
    elif recipe.data.embedded is None:
        for name, path in absent:
            problems.note(f"{name}: no manifest at {path}; make it with uniformerv2 prepare")
    if prepared is not None:
        kept = resume_settings(recipe, prepared)
        # Without --ranks the number of ranks is a guess. The memory of the ranks is always a guess.
        assumed = (BATCH_NORM_CLIPS,) if asked is None or recipe.engine.micro_batch == "auto" else ()
        notes += problems.attempt(lambda: check_checkpoint(folder, kept, resume, allowed, assumed)) or ()
    opened, embedded = _train_manifests(recipe), recipe.data.embedded
    class_names = opened[0].class_names if opened else tuple(CLASS_NAMES) if embedded else ()
    videos = sum(map(len, opened)) if opened else embedded.train_clips if embedded else 0
    starting: Sequence[str] = ()
    layout = (
        prepared.layout
        if prepared
        else problems.attempt(lambda: _layout(recipe, len(class_names), ranks, available))
    )
    for name, value in (("precision", "bf16"), ("device", "cuda")):
        if asked is None and not torch.cuda.is_available() and getattr(recipe.engine, name) == value:
            problems.note(f"engine.{name} is {value}, but torch sees no GPU here")
    if layout is not None:
        config = model_config(recipe, len(class_names) or 1, layout.recomputed_blocks)
        notes += fp8_notes(recipe, config, layout, ranks, available.kind)
        if not _resumes(folder, resume):  # a resumed training does not read the file
            starting = problems.attempt(lambda: _starting(recipe, config, class_names)) or ()
        if not class_names and recipe.model.num_classes is None:
            figures = "computed for 1 class: the manifest, which has the class names, is missing"
            _print_list("figures", [figures])
        facts = _facts(recipe, config, ranks, layout, videos, available.kind)
        table = facts_table(facts, wraps=True)
        table.add_row("memory per rank", f"{_memory(recipe, config, ranks, layout, available)} of {whose}")
        Console().print(table)
    for heading, lines in (
        ("chosen for this memory", layout.why if layout else ()),
        ("changes that make it fit", layout.advice if layout else ()),
        ("starting weights", starting),
        ("rendered at the start", [f"{name}: {path}" for name, path in absent if recipe.data.embedded]),
        ("notes", notes),
    ):
        _print_list(heading, lines)
    if problems:
        raise RunError("\n".join(["a run could not start here:", *_bulleted(problems)]))
    print("\nnothing is missing on this machine")
    return 0


def _prepared(
    recipe: Recipe,
    ranks: int,
    available: AvailableMemory,
    problems: _Problems,
    resumed: TrainState | None,
) -> tuple[Preparation | None, list[str]]:
    """The resolved recipe and the notes; None where the recipe cannot be resolved."""
    opened = [problems.attempt(partial(open_manifest, path)) for _, path in recipe.data.manifest_fields]
    found = [manifest for manifest in opened if manifest is not None]
    if len(found) < len(opened):
        return None, []
    notes = list(problems.attempt(lambda: check_videos(recipe, found)) or ())
    prepared = problems.attempt(lambda: prepare(recipe, ranks, available, resumed=resumed))
    if prepared is not None:
        train, val = prepared.train, prepared.val
        problems.attempt(lambda: check_decoder(recipe, train, gpu=available.kind == "cuda"))
        why = {*prepared.layout.why, *memory_notes(prepared.layout)}
        notes += [note for note in prepared.notes if note not in why]
        notes += overlap_notes(train, val)
        notes += short_side_notes(recipe, train.manifests)
    return prepared, notes


def _train_manifests(recipe: Recipe) -> list[Manifest]:
    """The training manifests; none where one is missing or cannot be read, which is reported already."""
    with suppress(DataError):
        return [Manifest.open(part.manifest) for part in recipe.data.train_manifests]
    return []


def _resumes(folder: RunDir, resume: str) -> bool:
    """Whether the run would resume from a checkpoint."""
    if resume == "auto":
        return bool(Retention(folder.checkpoints).visible())
    return resume != "never"


def _starting(recipe: Recipe, config: UniFormerV2Config, class_names: Sequence[str]) -> tuple[str, ...]:
    """The report on the starting weights. Raises RunError where they do not fit."""
    if recipe.model.weights is None:
        return ()
    found = plan_starting_weights(
        recipe.model.weights, config, class_names, preprocessing(recipe, config), recipe.model.inflation
    )
    return found.report if class_names else ()  # without class names the line about the head would be wrong


def _layout(recipe: Recipe, classes: int, ranks: int, available: AvailableMemory) -> BatchPlan:
    precision = choose_precision(recipe.engine.precision, torch.device(available.kind))
    return choose_batch_plan(
        recipe, model_config(recipe, classes or 1), ranks, precision=precision, available=available
    )


def _print_list(heading: str, lines: Iterable[str]) -> None:
    bulleted = _bulleted(lines)
    if bulleted:
        Console().print(f"\n[bold]{heading}[/bold]")
        print("\n".join(bulleted))


def _bulleted(texts: Iterable[str]) -> list[str]:
    """Each text as a list item, wrapped to the terminal's width; a path is never broken."""
    columns = shutil.get_terminal_size().columns
    lines = []
    for text in texts:
        for number, line in enumerate(text.split("\n")):
            wrapped = textwrap.TextWrapper(columns, break_long_words=False, break_on_hyphens=False)
            wrapped.initial_indent, wrapped.subsequent_indent = "    " if number else "  - ", "    "
            lines += wrapped.wrap(line)
    return lines


def _facts(
    recipe: Recipe,
    config: UniFormerV2Config,
    ranks: int,
    layout: BatchPlan,
    videos: int,
    kind: str,
) -> Iterator[tuple[str, str]]:
    """Names and values. videos: for training; 0 where they are not known. kind: of device."""
    batch, of_step = recipe.optimisation.global_batch, train_step_flops(config)
    classes = f"{config.num_classes} class{'es' * (config.num_classes != 1)}"
    size = f"{config.frames} frames of {config.resolution} px, {classes}"
    yield "recipe", recipe.name
    yield "model", f"{recipe.model.preset}, {recipe.model.form}: {size}"
    trained = trainable_parameter_count(config)
    yield "parameters", f"{parameter_count(config):,}, of which {trained:,} are trained"
    precision = choose_precision(recipe.engine.precision, torch.device(kind))
    yield "precision", precision + ", products of the blocks' linear layers in FP8" * recipe.engine.fp8
    of_view = format_gmacs(multiply_accumulates(config) / 1e9)
    yield "cost", f"{of_view} a view; {_flop(of_step)} a clip and training step"
    each = f"{layout.micro_batch} clips x {layout.accumulation} accumulated"
    yield "batch", f"{batch} clips a step = {ranks} rank{'s' if ranks > 1 else ''} x {each}"
    total = 0.0
    if videos or recipe.optimisation.steps:
        schedule = Schedule.of(recipe, videos * recipe.sampling.repeats / batch)
        total = schedule.total_steps * of_step * batch
        steps = f"{schedule.total_steps:,} ({schedule.warmup_steps:,} of warm-up)"
        yield "steps", f"{steps}, {_flop(total)} in all"
    else:
        epochs = f"of {recipe.optimisation.epochs:g} epochs"
        yield "steps", f"{epochs}; their number depends on the missing manifest"
    yield "evaluation", f"clips x crops of a video: {recipe.evaluation.clips} x {recipe.evaluation.crops}"
    if kind == "cuda" and total:
        yield "GPU time", _gpu_time(total, ranks)


def _gpu_time(flops: float, ranks: int) -> str:
    """The time of the training steps at `ASSUMED_MFU`."""
    hours = gpu_hours(flops)
    return (
        f"about {hours:,.3g} GPU hours, {hours / ranks:,.3g} hours on {ranks}, if {ASSUMED_MFU:.0%} of an "
        "H100's peak is reached: an assumption, without evaluation and waiting"
    )


def gpu_hours(flops: float) -> float:
    """Hours of one H100 at `ASSUMED_MFU`."""
    return flops / (ASSUMED_MFU * ASSUMED_PEAK) / 3600


def _available_memory(recipe: Recipe, ranks: int | None) -> tuple[AvailableMemory, str]:
    """Memory of a rank, and its device. Assumes a GPU where the run needs one and this machine has none."""
    engine = recipe.engine
    if engine.device != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", 0)
        whose = f"the {torch.cuda.get_device_name(device)} here"
        return AvailableMemory("cuda", free_bytes(device, 1)), whose
    wants_gpu = engine.device == "cuda" or engine.precision == "bf16" or ranks is not None
    if engine.device != "cpu" and wants_gpu:
        return AvailableMemory("cuda", ASSUMED_GPU), "an assumed GPU: there is none here"
    return AvailableMemory("cpu", free_bytes(torch.device("cpu"), ranks or 1)), "this machine's memory"


def _memory(
    recipe: Recipe, config: UniFormerV2Config, ranks: int, layout: BatchPlan, available: AvailableMemory
) -> str:
    """The memory estimate that `auto` uses."""
    precision = choose_precision(recipe.engine.precision, torch.device(available.kind))
    needs = MemoryModel.of(recipe, config, ranks=ranks, precision=precision, kind=available.kind)
    estimate = needs.estimate(
        zero_stage=layout.zero_stage,
        micro_batch=layout.micro_batch,
        recomputed_blocks=layout.recomputed_blocks,
    )
    parts = (
        (
            estimate.states,
            f"of weights, gradients and optimiser (ZeRO {layout.zero_stage}, {needs.precision})",
        ),
        (estimate.working, "of activations and buffers"),
        (estimate.clips, "of prefetched clips"),
        (estimate.reserve, "in reserve"),
    )
    named = ", ".join(f"{format_bytes(amount)} {text}" for amount, text in parts)
    fits = "" if estimate.total <= available.bytes else ", too much for the device"
    return f"about {format_bytes(estimate.total)}{fits}: {named}; there are {format_bytes(available.bytes)}"


def _flop(amount: float) -> str:
    """Floating-point operations with a unit prefix."""
    exponent = min(21, max(9, 3 * int(math.log10(max(amount, 1)) // 3)))
    unit = {9: "G", 12: "T", 15: "P", 18: "E", 21: "Z"}[exponent]
    return f"{amount / 10**exponent:,.1f} {unit}FLOP"
