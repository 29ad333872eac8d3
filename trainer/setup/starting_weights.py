"""`model.weights`: loads the weights that a training starts from, from any supported kind of file."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from models import ModelError, UniFormerV2, UniFormerV2Config
from models.weights.files import StoredWeights, open_weights
from models.weights.image_backbones import Inflation, check_image_weights, load_image_weights
from models.weights.released import describe_released, is_released, model_shapes, read_released
from models.weights.row_maps import agrees_with_order
from models.weights.safetensors_header import shorten
from models.weights.transfer import TransferPlan, VideoWeights, load_transfer, plan_transfer
from pipelines.dataset import kinetics710
from pipelines.formatting import format_count
from trainer.checkpoint.metadata import STATE
from trainer.checkpoint.weights import FORMAT, open_described
from trainer.errors import RunError
from trainer.setup.class_mapping import match_rows_by_name, synonyms_between

_NAMED = 4  # classes or groups of tensors that a line of the report lists

Rows = tuple[int | None, ...]


@dataclass(frozen=True)
class StartingWeights:
    """Weights that fit a model. Only names and shapes have been read."""

    report: tuple[str, ...]
    """At most 15 lines: the kind of file, and which tensors are loaded, adapted, new or left out."""
    names: Mapping[str, tuple[str, ...]]
    """All names of tensors: of the model those that are `loaded`, of these the `adapted` ones, and the `new`
    ones that keep their initialisation; and those of the file that are `left_out`."""
    load: Callable[[UniFormerV2], object]
    """Loads them into the model. Raises ModelError for a tensor that cannot be read or is not finite."""


def plan_starting_weights(
    path: Path,
    config: UniFormerV2Config,
    class_names: Sequence[str],
    preprocessing: Mapping[str, Any],
    inflation: Inflation = "centre",
) -> StartingWeights:
    """Detect the kind of the file, and match its tensors with those of the model.

    class_names: classes of the training manifest, in the order of the labels. preprocessing: as
    `trainer.setup.preparation.preprocessing` returns it. inflation: how a patch embedding over one frame
    becomes one over several.

    Raises RunError for a folder, a file without weights, or names and shapes that do not fit the model.
    """
    _check_no_folder(path)
    try:
        stored = open_weights(path)
        if stored.metadata.get("format_version") == FORMAT:
            return _own(path, config, class_names, preprocessing, inflation)
        if is_released(stored.shapes):
            return _released(path, stored, config, class_names, inflation)
        if any(name.startswith("weight/blocks.") for name in stored.shapes):
            raise ModelError(
                f"{path} is one shard of a checkpoint: export the weights with `uniformerv2 export "
                f"{path.parent} --out weights.safetensors`, and name that file"
            )
        return _image(path, stored, config, inflation)
    except (ModelError, RunError) as error:
        raise RunError(f"model.weights: {error}") from error


def _check_no_folder(path: Path) -> None:
    if not path.is_dir():
        return
    if (path / "weights.safetensors").is_file():
        hint = f"name {path / 'weights.safetensors'} in it"
    elif (path / STATE).is_file() or (path / "checkpoints").is_dir():
        hint = f"export its weights with `uniformerv2 export {path} --out FILE`, and name that file"
    else:
        hint = "name a file of weights"
    raise RunError(f"model.weights: {path} is a folder; {hint}")


def _own(
    path: Path,
    config: UniFormerV2Config,
    class_names: Sequence[str],
    preprocessing: Mapping[str, Any],
    inflation: Inflation,
) -> StartingWeights:
    found = open_described(path)
    there = found.model.config
    rows, head = _rows_by_name(found.class_names, class_names, config.num_classes)
    source = VideoWeights(str(path), there, found.stored.shapes, found.stored.read)
    plan = plan_transfer(source, config, rows)
    other = [
        f"{name} {found.description['preprocessing'].get(name)} in the file, {preprocessing[name]} here"
        for name in ("mean", "std")
        if found.description["preprocessing"].get(name) != preprocessing[name]
    ]
    return _video("an export of this program", source, config, plan, head, other, inflation)


def _released(
    path: Path,
    stored: StoredWeights,
    config: UniFormerV2Config,
    class_names: Sequence[str],
    inflation: Inflation,
) -> StartingWeights:
    released = describe_released(stored, frames=config.frames)
    rows, head = _released_rows(
        released.config.num_classes, released.is_port, class_names, config.num_classes
    )

    def read(names: Iterable[str]) -> Mapping[str, Tensor]:
        return read_released(released, names)

    source = VideoWeights(str(path), released.config, model_shapes(released), read)
    plan = plan_transfer(source, config, rows)
    notes = []
    if released.config.temporal_downsample:
        notes.append("its input channels are reversed: it was trained on BGR frames, this program reads RGB")
    kind = "mmaction2's port of a released UniFormerV2" if released.is_port else "a released UniFormerV2"
    return _video(kind, source, config, plan, head, notes, inflation)


def _image(
    path: Path, stored: StoredWeights, config: UniFormerV2Config, inflation: Inflation
) -> StartingWeights:
    found = check_image_weights(config, stored)
    return StartingWeights(
        (
            f"starting weights: {path}, {found.family}",
            *found.adaptations,
            _loaded(found.loaded, found.kept),
            *_left_out(found.left_out),
            f"head: new, {config.num_classes} rows; image weights have no video classes",
        ),
        _names(found.loaded, found.adapted, found.kept, found.left_out),
        lambda model: load_image_weights(model, stored, inflation),
    )


def _names(
    loaded: tuple[str, ...], adapted: tuple[str, ...], new: tuple[str, ...], left_out: tuple[str, ...]
) -> dict[str, tuple[str, ...]]:
    return {"loaded": loaded, "adapted": adapted, "new": new, "left_out": left_out}


def _left_out(names: Sequence[str]) -> list[str]:
    return [f"left out: {_groups(names)}, which the model does not have"] if names else []


def _video(
    kind: str,
    source: VideoWeights,
    config: UniFormerV2Config,
    plan: TransferPlan,
    head: str,
    notes: Sequence[str],
    inflation: Inflation,
) -> StartingWeights:
    there = source.config
    report = [
        f"starting weights: {source.origin}, {kind}, of {there.num_classes} classes",
        *_adapted(plan.adapted, config.grid, there),
        _loaded(tuple(plan.sources), plan.new),
        *_left_out(plan.left_out),
    ]
    if there.fusion != config.fusion:
        report.append(f"fusion: {there.fusion} in the file, {config.fusion} here; global blocks are loaded")
    for name in ("temporal_module", "output"):
        if getattr(there, name) != getattr(config, name):
            report.append(f"{name}: {getattr(there, name)} in the file, {getattr(config, name)} here")
    if there.frames != config.frames and "temporal_position" not in plan.adapted:
        report.append(f"frames: {there.frames} in the file, {config.frames} here; no weight depends on them")
    report += [f"note: {note}" for note in notes]
    report.append(f"head: {head}")
    names = _names(tuple(plan.sources), plan.adapted, plan.new, plan.left_out)
    return StartingWeights(tuple(report), names, lambda model: load_transfer(model, source, plan, inflation))


def _adapted(names: Sequence[str], grid: int, there: UniFormerV2Config) -> list[str]:
    lines = []
    if "position_embedding" in names:
        change = f"from {there.grid}x{there.grid} to {grid}x{grid} patches"
        lines.append(f"position embedding: interpolated {change}, bicubically")
    if any(name.endswith(".positions.table") for name in names):
        lines.append(f"relative positions: interpolated to {grid}x{grid} patches, bicubically")
    if "patch_embedding.weight" in names:
        lines.append("patch embedding: adapted to another temporal size; a still clip gives the same tokens")
    if "temporal_position" in names:
        lines.append("temporal position: interpolated to another number of frames, linearly")
    return lines


def _loaded(loaded: Sequence[str], new: Sequence[str]) -> str:
    body = [name for name in new if not name.startswith("head.")]
    keeps = f"; {len(body)} keep their initialisation: {_groups(body)}" if body else ""
    return f"tensors: {len([name for name in loaded if not name.startswith('head.')])} loaded{keeps}"


def _groups(names: Sequence[str]) -> str:
    """Names of tensor groups with counts. A group is a name without block numbers and its last part."""
    groups: dict[str, int] = {}
    for name in names:
        parts = [part for part in name.split(".") if not part.isdigit()]
        group = ".".join(parts[:2]) if len(parts) > 1 else name
        groups[group] = groups.get(group, 0) + 1
    shown = [f"{shorten(group)} ({count})" for group, count in list(groups.items())[:_NAMED]]
    more = len(groups) - _NAMED
    return ", ".join(shown) + (f" and {format_count(more, 'group')} more" if more > 0 else "")


def _rows_by_name(
    head: Sequence[str | None], class_names: Sequence[str], num_classes: int
) -> tuple[Rows, str]:
    """For each row of the model's head the row in the file or None, and a line for the report."""
    if list(head) == list(class_names) and len(head) == num_classes:
        return tuple(range(num_classes)), f"all {num_classes} rows kept: the same classes in the same order"
    rows = match_rows_by_name(head, class_names) + (None,) * (num_classes - len(class_names))
    found = sum(row is not None for row in rows)
    absent = [name for name, row in zip(class_names, rows, strict=False) if row is None]
    named = ", ".join(map(shorten, absent[:_NAMED])) + (", ..." if len(absent) > _NAMED else "")
    if not found:
        known = ", ".join(shorten(name) for name in head[:_NAMED] if name)
        numbers = all(name.isdecimal() for name in class_names)
        why = "the manifest's class names are mere numbers" if numbers else f"none of {named} is among them"
        return rows, f"new, {num_classes} rows: the file's classes are {known}, ...; {why}"
    text = f"{found} of {num_classes} rows copied by class name, of the file's {len(head)}"
    if absent:
        text += f"; new: {len(absent)} ({named})"
    unnamed = num_classes - len(class_names)
    return rows, text + (f"; new: {unnamed} without a class in the manifest" if unnamed else "")


def _released_rows(
    count: int, is_port: bool, class_names: Sequence[str], num_classes: int
) -> tuple[Rows, str]:
    """As `_rows_by_name`, for a file without class names."""
    if is_port and (table := kinetics710.TABLES.get(count)):
        rows, text = _rows_by_name(kinetics710.class_names(table), class_names, num_classes)
        return rows, f"{text}; read in mmaction2's order of Kinetics-{count}"
    union = kinetics710.released_names()
    order = kinetics710.released_rows().get(len(class_names))
    synonyms = synonyms_between(union, class_names)
    fits = order is not None and count in (len(class_names), len(union))
    if order is not None and fits and agrees_with_order(union, order, class_names, synonyms):
        taken = order if count == len(union) else tuple(range(count))
        rest = (None,) * (num_classes - len(taken))
        return (*taken, *rest), f"{len(taken)} rows copied: the manifest has the authors' order of Kinetics"
    if count == 400:
        rows, text = _rows_by_name(kinetics710.class_names("k400_released"), class_names, num_classes)
        return rows, f"{text}; read in the authors' order of Kinetics-400"
    if count == len(union):
        rows, text = _rows_by_name(union, class_names, num_classes)
        return rows, f"{text}; only rows 0 to 399 of the authors' Kinetics-710 have published names"
    return (None,) * num_classes, (
        f"new, {num_classes} rows: the file does not name its {count} classes, and their order is unknown"
    )
