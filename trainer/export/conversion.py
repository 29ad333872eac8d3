"""Converts a model between this program's file, the authors' naming and mmaction2's."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from models import ModelError, UniFormerV2
from models.weights.files import open_weights
from models.weights.released import is_released, to_file
from pipelines.atomic_file import atomic_file
from pipelines.dataset import kinetics710
from trainer.checkpoint.tensor_file import write_tensors
from trainer.checkpoint.weights import SavedWeights, save_weights
from trainer.errors import RunError
from trainer.inference.model_source import open_model
from trainer.monitoring.run_dir import check_not_of_run
from trainer.setup.class_mapping import find_head_rows

Naming = Literal["own", "released", "mmaction2"]
Labels = Literal["released", "mmaction2"]
Head = Literal["k400", "k600", "k700"]

_TORCH_SUFFIXES = (".pyth", ".pth", ".pt")  # this program writes none of them into a run directory
_OWNER = {"released": "the authors'", "mmaction2": "mmaction2's"}


def convert(
    source: Path,
    out: Path,
    to: Naming,
    *,
    frames: int | None = None,
    class_names: tuple[str, ...] | None = None,
    labels: Labels | None = None,
    head: Head | None = None,
    last: bool = False,
) -> list[str]:
    """Write the model in `source` to `out`, and return what was done, in words.

    Args:
        source: as for `open_model`. frames, class_names, last: likewise.
        out: a safetensors file; of the other two namings also a file of `torch.save`, by its suffix.
        labels: the order of a head's rows where the source has no class names; None: of the source's naming.
        head: reduces a head of Kinetics-710 to the rows of a smaller Kinetics.

    Raises:
        RunError: `open_model` refuses the source, the naming cannot represent the model, the head is not one
            of Kinetics-710 or lacks classes, or the file is part of the source or cannot be written.
    """
    _check_not_source(source, out)
    check_not_of_run(out)
    space = _label_space(source, labels)
    if frames is None and space is not None and to != "own":
        frames = 8  # the weights do not depend on it
    found = open_model(source, last=last, frames=frames, class_names=class_names)
    form = "Something-Something's form" if found.model.config.temporal_downsample else "the scene form"
    origin = "a model of this program" if space is None else "a released UniFormerV2 or a port of one"
    lines = [f"{source}: {origin}, of {form}, {found.model.config.num_classes} classes"]
    if space is not None and class_names is None:
        found, line = _with_names(found, space)
        lines.append(line)
    if head is not None:
        found, line = _with_head(found, head, space, is_named=class_names is not None)
        lines.append(line)
    lines += _about_channels(found.model, space, to)
    _write(found, out, to)
    return [*lines, f"wrote {out}"]


def _check_not_source(source: Path, out: Path) -> None:
    """Raises RunError where `out` would replace the source, or a file of the source's folder."""
    if not (source.exists() and out.exists()):
        return
    is_inside = source.is_dir() and out.resolve().is_relative_to(source.resolve())
    if os.path.samefile(source, out) or (is_inside and out.suffix not in _TORCH_SUFFIXES):
        raise RunError(
            f"{out} is {'a file of the source' if is_inside else 'the source'}; name another --out"
        )


def _label_space(source: Path, labels: Labels | None) -> Labels | None:
    """The order of the rows of a released file or a port; None for a source with class names."""
    try:
        names = [] if source.is_dir() else list(open_weights(source).shapes)
    except ModelError as error:
        raise RunError(str(error)) from error
    if not is_released(names):
        if labels is not None:
            raise RunError(
                f"{source} names its classes: --labels is for released checkpoints and their ports"
            )
        return None
    return labels or ("mmaction2" if any(name.startswith("cls_head.") for name in names) else "released")


def _with_names(found: SavedWeights, space: Labels) -> tuple[SavedWeights, str]:
    """With the class names that belong to the number of rows, and a line that names them."""
    count = found.model.config.num_classes
    table = kinetics710.TABLES.get(count)
    if table is None or (space == "released" and count in (600, 700)):
        return (
            found,
            f"classes: unnamed; the order of {count} classes is not published (--classes FILE names them)",
        )
    released = kinetics710.released_names()[:count]
    names = kinetics710.class_names(table) if space == "mmaction2" else released
    unknown = sum(name is None for name in names)
    known = f", of which {unknown} have no published name" if unknown else ""
    line = f"classes: Kinetics-{count} in {_OWNER[space]} order, by their number{known}"
    return dataclasses.replace(found, class_names=_filled(names)), line


def _filled(names: Sequence[str | None]) -> tuple[str, ...]:
    return tuple(name or f"row {row}" for row, name in enumerate(names))


def _with_head(
    found: SavedWeights, head: Head, space: Labels | None, *, is_named: bool
) -> tuple[SavedWeights, str]:
    """The model with the rows of a smaller Kinetics, and a line about them.

    is_named: whether the user gave the names of the rows, which are kept.
    """
    count = found.model.config.num_classes
    size = int(head.removeprefix("k"))
    union = kinetics710.UNION
    if count != union:
        raise RunError(
            f"the head has {count} rows: only one of {union}, of Kinetics-710, has those of {head}"
        )
    names = _filled(kinetics710.released_names())
    if space == "released" or found.class_names == names:
        rows = (
            kinetics710.released_rows()[size] if size in kinetics710.released_rows() else tuple(range(size))
        )
        named = tuple(names[row] for row in rows)
        order = "the authors'"
    elif space == "mmaction2":
        rows, named, order = kinetics710.union_rows(head), kinetics710.class_names(head), "the alphabetical"
    else:
        named, order = kinetics710.class_names(head), "the alphabetical"
        rows = find_head_rows(found.class_names, named)
    if is_named:
        named = tuple(found.class_names[row] for row in rows)
    model = _with_rows(found.model, rows)
    line = f"head: {size} of {union} rows, Kinetics-{size} in {order} order"
    return dataclasses.replace(found, model=model, class_names=named), line


def _with_rows(model: UniFormerV2, rows: Sequence[int]) -> UniFormerV2:
    state = dict(model.state_dict())
    for name in ("head.weight", "head.bias"):
        state[name] = state[name][list(rows)]
    with torch.device("meta"):
        reduced = UniFormerV2(dataclasses.replace(model.config, num_classes=len(rows)))
    reduced.load_state_dict(state, assign=True)
    return reduced.eval()


def _about_channels(model: UniFormerV2, space: Labels | None, to: Naming) -> list[str]:
    if not model.config.temporal_downsample or (space is None) == (to == "own"):
        return []
    if space is None:
        return ["input channels: reversed, as models with temporal downsampling read BGR frames there"]
    return ["input channels: reversed, as it was trained on BGR frames and this program reads RGB"]


def _write(found: SavedWeights, out: Path, to: Naming) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{out} cannot be written: {error.strerror or error}") from error
    if to == "own":
        description = {
            "model": dataclasses.asdict(found.model.config),
            "class_names": list(found.class_names),
            "preprocessing": found.preprocessing,
            "recipe": found.recipe,
        }
        save_weights(out, found.model.state_dict(), description)
        return
    try:
        tensors = to_file(found.model, port=to == "mmaction2")
    except ModelError as error:
        raise RunError(f"this model has no form in {_OWNER[to]} implementation: {error}") from error
    try:
        with atomic_file(out, sync=True) as partial:
            _write_named(partial, tensors, to, is_safe=out.suffix == ".safetensors")
    except OSError as error:
        raise RunError(f"{out} cannot be written: {error.strerror or error}") from error


def _write_named(partial: Path, tensors: dict[str, Tensor], to: Naming, *, is_safe: bool) -> None:
    if is_safe:
        write_tensors(partial, tensors, {})
    elif to == "mmaction2":
        torch.save({"meta": {}, "state_dict": tensors}, partial)
    else:
        torch.save({"model_state": tensors}, partial)
