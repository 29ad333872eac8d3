"""What a model costs: parameters, operations and activation memory, beside the published figures."""

import dataclasses
import difflib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import PRESETS, UniFormerV2Config, build_config
from models.cost import (
    activation_bytes,
    multiply_accumulates,
    parameter_count,
    train_step_flops,
    trainable_parameter_count,
)
from trainer.checkpoint.metadata import STATE, read_newest, read_state
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.weights import described_config, open_described
from trainer.config.load import load_recipe, neighbour_hint, read_stored_recipe
from trainer.config.schema import Recipe
from trainer.errors import RecipeError, RunError
from trainer.inference.model_source import HUB_WEIGHTS
from trainer.monitoring.run_dir import RunDir, find_run_dirs
from trainer.paper.published_costs import PublishedCost, costs_of, published_costs
from trainer.setup.preparation import model_config
from trainer.system.formatting import format_bytes
from trainer.tracking.comparison.render import Block, Cell, Column, Heading, Paragraph, Table

_OPTIONS = {"preset": "its name", "form": "--form", "frames": "--frames", "num_classes": "--classes"}
_WEIGHTS = (".safetensors", ".pyth", ".pth", ".pt", ".bin")
_EXPECTED = "name a recipe, a preset, a run directory, a checkpoint or a file of weights"
_CLASSES = 400  # of a model without a number of classes, where the manifest would have it


@dataclass(frozen=True)
class ModelDescription:
    """The cost of one model."""

    name: str
    config: UniFormerV2Config
    parameters: int
    trained: int
    """Parameters with a gradient."""
    multiply_accumulates: int
    """Of one view, which the paper calls FLOPs."""
    step_flops: int
    """Floating-point operations of forward and backward of `batch` clips."""
    batch: int
    """Clips of an optimiser step; 1 without a recipe."""
    activation_bytes: int
    """Bytes that the forward of one clip keeps for the backward, in bf16 unless the recipe says otherwise."""
    classes_assumed: bool = False
    """Whether the recipe leaves the number of classes to the manifest: then the costs are for 400."""

    @property
    def published(self) -> list[PublishedCost]:
        """The rows of this structure; none for an assumed number of classes."""
        return [] if self.classes_assumed else costs_of(self.config)

    def as_json(self) -> dict[str, Any]:
        rows = [comparison(row, self) for row in self.published]
        found = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "config"
        }
        return {**found, "model": dataclasses.asdict(self.config), "published": rows}


def describe_named(name: str, overrides: Sequence[str] = ()) -> ModelDescription:
    """The cost of a recipe, a run directory, a checkpoint, or a file or exported folder of weights.

    A run is named by its directory, weights and checkpoints by their path. overrides: of a recipe, or of a
    run without weights and checkpoints. Raises RecipeError, ModelError and RunError.
    """
    path = Path(name)
    trained = _find_trained(path)
    if trained is not None:
        if overrides:
            raise RunError(f"--set {overrides[0]}: the model of {path} is fixed; name a recipe to change it")
        return _describe_trained(_name_of(path), trained)
    if path.is_dir():
        recipe = RunDir(path).recipe
        if recipe.is_file():
            return dataclasses.replace(describe_recipe(recipe, overrides), name=_name_of(path))
        inside = [found for found in (*find_run_dirs(path), *Retention(path).visible()) if found != path]
        hint = f", such as {inside[-1]} in it" if inside else ""
        raise RunError(f"{path} is a folder without weights, checkpoint or recipe; {_EXPECTED}{hint}")
    if not path.exists() and (path.suffix or len(path.parts) > 1):
        raise RunError(f"{path} does not exist; {_EXPECTED}{neighbour_hint(path)}")
    try:
        return describe_recipe(path, overrides)
    except RecipeError as error:
        if path.exists() and path.suffix not in (".yaml", ".yml"):
            kind = "a manifest, which has no model" if path.suffix == ".arrow" else "no recipe"
            raise RunError(f"{path} is {kind}; {_EXPECTED}") from error
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.7)
        if not near or path.suffix:
            raise
        raise RecipeError(f"there is no recipe or preset {name}; did you mean {near[0]}?") from error


def _find_trained(path: Path) -> dict[str, Any] | None:
    """What weights or a checkpoint store about their model; None where there are none."""
    if (path / STATE).is_file():
        return read_state(path).description
    weights = next(
        (file for file in (path / HUB_WEIGHTS, RunDir(path).weights, path) if file.is_file()), None
    )
    if weights is None:
        newest = read_newest(Retention(RunDir(path).checkpoints).visible())
        return None if newest is None else newest[1].description
    if weights.suffix == ".safetensors":
        return open_described(weights).description
    if weights.suffix in _WEIGHTS:
        raise RunError(
            f"{path} is a file of weights without a description of the model: describe the preset, or write "
            f"a file of this program with `uniformerv2 convert {path} --to own --frames N --out FILE`"
        )
    return None


def with_distinct_names(models: Sequence[ModelDescription], given: Sequence[str]) -> list[ModelDescription]:
    """The models, those of equal names renamed. given: for each model, what the user called it."""
    count = Counter(model.name for model in models)
    return [
        dataclasses.replace(model, name=name) if count[model.name] > 1 else model
        for model, name in zip(models, given, strict=True)
    ]


def _name_of(path: Path) -> str:
    return path.resolve().name if path.is_dir() and not (path / STATE).exists() else str(path)


def _describe_trained(name: str, description: dict[str, Any]) -> ModelDescription:
    config, recipe = described_config(description), read_stored_recipe(description["recipe"])
    if recipe is None:
        return _described(name, config, 1, "auto")
    return _described(name, config, recipe.optimisation.global_batch, recipe.engine.precision)


def describe_recipe(path: Path, overrides: Sequence[str] = ()) -> ModelDescription:
    """The cost of a recipe's model.

    path: as for `load_recipe`. Without `model.num_classes`, the manifest has their number: then 400, and
    no published figures beside them. Raises RecipeError and ModelError.
    """
    return describe(load_recipe(path, overrides))


def describe(recipe: Recipe) -> ModelDescription:
    """The cost of a loaded recipe's model. Raises RecipeError and ModelError."""
    blocks = recipe.engine.recomputed_blocks
    config = model_config(recipe, _CLASSES, blocks if isinstance(blocks, int) else 0)
    found = _described(recipe.name, config, recipe.optimisation.global_batch, recipe.engine.precision)
    return dataclasses.replace(found, classes_assumed=recipe.model.num_classes is None)


def describe_preset(
    preset: str, *, form: str, frames: int, num_classes: int, overrides: Sequence[str] = ()
) -> ModelDescription:
    """The cost of a preset.

    overrides: `field=value`, of `UniFormerV2Config`. Raises ModelError and RunError.
    """
    fields: dict[str, Any] = {}
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            raise RunError(f"--set {text}: an override of a preset has the form field=value")
        try:
            fields[name.removeprefix("model.overrides.")] = json.loads(value)
        except (ValueError, RecursionError):
            fields[name.removeprefix("model.overrides.")] = value
    for name, option in _OPTIONS.items():
        if name in fields:
            raise RunError(f"--set {name}: give {option} instead")
    config = build_config(preset, form=form, frames=frames, num_classes=num_classes, **fields)
    return _described(preset, config, 1, "auto")


def _described(name: str, config: UniFormerV2Config, batch: int, precision: str) -> ModelDescription:
    return ModelDescription(
        name=name,
        config=config,
        parameters=parameter_count(config),
        trained=trainable_parameter_count(config),
        multiply_accumulates=multiply_accumulates(config),
        step_flops=batch * train_step_flops(config),
        batch=batch,
        activation_bytes=activation_bytes(
            config,
            batch=1,
            bytes_per_element=4 if precision == "fp32" else 2,
            autocast=precision == "autocast",
        ),
    )


def comparison(row: PublishedCost, model: ModelDescription) -> dict[str, Any]:
    """A published row beside the model's own figures."""
    parameters = model.trained if row.counts_trained else model.parameters
    flops = model.multiply_accumulates * row.views
    return {
        "source": row.source,
        "crops": row.crops,
        "clips": row.clips,
        "parameters": row.parameters.text,
        "own_parameters": parameters,
        "parameters_agree": row.parameters.agrees(parameters),
        "flops": row.flops.text,
        "own_flops": flops,
        "flops_agree": row.flops.agrees(flops),
        "difference": flops / row.flops.value - 1,
        "note": row.note,
    }


def report(models: Iterable[ModelDescription]) -> list[Block]:
    """The costs of the models, and the published ones of the same structure."""
    models = list(models)
    columns = [Column("model", numeric=False, name=True)]
    heads = ("parameters", "trained", "GMACs a view", "TFLOP a step", "clips a step", "activations a clip")
    columns += [Column(head) for head in heads]
    rows = [
        [
            Cell(model.name),
            Cell(f"{model.parameters:,}"),
            Cell(f"{model.trained:,}"),
            Cell(_giga(model.multiply_accumulates)),
            Cell(f"{model.step_flops / 1e12:,.4g}"),
            Cell(str(model.batch)),
            Cell(format_bytes(model.activation_bytes)),
        ]
        for model in models
    ]
    blocks: list[Block] = [Table(columns, rows)]
    found = [(model.name, comparison(row, model)) for model in models for row in model.published]
    if assumed := [model.name for model in models if model.classes_assumed]:
        blocks.append(
            Paragraph(
                f"{', '.join(assumed)}: without model.num_classes, {_CLASSES} classes are assumed; "
                "--set model.num_classes=N gives their number."
            )
        )
    if found:
        blocks += [Heading("Published figures"), _published(found)]
        blocks += [Paragraph(note) for note in dict.fromkeys(row["note"] for _, row in found) if note]
    return blocks


def published_report() -> list[Block]:
    """All published figures beside those of the models built for them."""
    found = published_comparisons()
    notes = [Paragraph(row["note"]) for row in found if row["note"]]
    return [_published([(row["model"], row) for row in found]), *notes]


def published_comparisons() -> list[dict[str, Any]]:
    """`comparison` of every published row with the model built for it, named by `model`."""
    return [
        {"model": _named(row), **comparison(row, _described("", row.config, 1, "auto"))}
        for row in published_costs()
    ]


def _named(row: PublishedCost) -> str:
    config, model = row.config, row.model
    local = f", {config.local_mhra} local MHRA" if config.local_mhra and model["form"] == "scene" else ""
    module = f", {config.temporal_module}" if config.temporal_module != "none" else ""
    pooled = "" if config.global_layers or module or local else ", mean pooling"
    form = "frozen" if config.frozen_backbone else model["form"]
    return f"{model['preset']} {form} {config.frames}f{local}{module}{pooled}"


def _published(found: Sequence[tuple[str, dict[str, Any]]]) -> Table:
    columns = [Column("model", numeric=False, name=True), Column("published in", numeric=False)]
    columns += [Column(head) for head in ("views", "parameters", "ours", "FLOPs", "ours", "difference")]
    rows = []
    for name, row in found:
        views = f"{row['crops']}x{row['clips']}"
        unit = row["flops"].partition(" ")[2]
        own = row["own_flops"] / {"G": 1e9, "T": 1e12}[unit]
        texts = [name, row["source"], views, row["parameters"], f"{row['own_parameters']:,}", row["flops"]]
        agrees = "0" if row["flops_agree"] else f"{100 * row['difference']:+.1f} %"
        rows.append([Cell(text) for text in (*texts, f"{own:,.3f} {unit}", agrees)])
    return Table(columns, rows)


def _giga(amount: int) -> str:
    return f"{amount / 1e9:,.1f}" if amount >= 1e9 else f"{amount / 1e9:.3g}"
