"""Resolves an evaluation request: model, manifest, classes, views and output folder."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from models.weights.row_maps import agrees_with_order
from pipelines.augment.params import ViewSpec
from pipelines.dataset import kinetics710
from pipelines.dataset.concat import Dataset
from pipelines.dataset.prepare.class_names import read_class_names
from pipelines.storage.remote_range import DIRECT, StorageOptions
from trainer.checkpoint.weights import SavedWeights
from trainer.config.load import read_stored_recipe
from trainer.config.schema import Recipe
from trainer.distributed.environment import Environment
from trainer.distributed.manifest_cache import open_manifest, prefetch_manifests
from trainer.errors import RunError
from trainer.inference.model_source import open_model
from trainer.inference.prediction import output_names
from trainer.inference.preprocessing import read_preprocessing
from trainer.setup.class_mapping import find_head_rows
from trainer.system.device import Precision, choose_precision


@dataclass(frozen=True)
class EvaluationRequest:
    """The options of the command; None takes the value of the source's recipe.

    source: a run directory, a checkpoint, or a file of weights.
    last: of a run, use the last weights, not the best.
    manifest: the videos.
    clips, crops: views per video.
    batch: videos per rank and batch; its views are computed in forward passes of bounded size.
    workers: processes per rank that read and decode.
    decoder, precision: as in the recipe.
    bad_share: largest share of unreadable videos.
    frames: frames per clip, for a released checkpoint.
    class_names: text file with the classes of a released checkpoint.
    out: folder for the results.
    again: delete an earlier evaluation in that folder.
    """

    source: Path
    last: bool = False
    manifest: Path | None = None
    clips: int | None = None
    crops: int | None = None
    batch: int | None = None
    workers: int | None = None
    decoder: str | None = None
    precision: str | None = None
    bad_share: float | None = None
    frames: int | None = None
    class_names: Path | None = None
    out: Path | None = None
    again: bool = False


@dataclass(frozen=True)
class EvaluationTarget:
    """A resolved evaluation request; fields that are not listed are as in the request.

    weights: the model and its metadata.
    dataset: the opened manifest.
    view: frames, size and number of views.
    rows: the row of the model's head for each class; None for all rows in their order.
    names: one name per score.
    mean, std: for normalisation.
    """

    source: Path
    weights: SavedWeights
    manifest: Path
    dataset: Dataset
    view: ViewSpec
    rows: tuple[int, ...] | None
    names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    precision: Precision
    batch: int
    workers: int | None
    decoder: str
    storage: StorageOptions
    bad_share: float
    out: Path

    def identity(self) -> dict[str, Any]:
        """The values that scores depend on beyond rounding, as JSON values. Hashes all weights."""
        return {
            "weights_sha256": weights_digest(self.weights),
            "fingerprint": self.dataset.fingerprint,
            "clips": self.view.clips,
            "crops": self.view.crops,
            "precision": self.precision,
            "decoder": self.decoder,
        }


def resolve_target(request: EvaluationRequest, environment: Environment) -> EvaluationTarget:
    """Read the model, open the manifest, match their classes.

    Call it on all ranks with `run_on_all_ranks`. Raises RunError, DataError or ModelError.
    """
    names = None if request.class_names is None else tuple(read_class_names(request.class_names))
    weights = open_model(request.source, last=request.last, frames=request.frames, class_names=names)
    recipe = read_stored_recipe(weights.recipe)
    released = not weights.recipe
    if released and names is None:
        weights = _with_known_names(weights)
    manifest = _manifest(request, recipe)
    prefetch_manifests([manifest], environment, None)
    dataset = Dataset([open_manifest(manifest)])
    rows = _rows(weights, dataset.class_names, ordered=released and names is None)
    config = weights.model.config
    pixels = read_preprocessing(weights.preprocessing, config.frames, config.resolution)
    views = pixels if recipe is None else recipe.evaluation
    recipe_bad_share = 0.01 if recipe is None else recipe.data.bad_share
    if pixels.max_short_side is not None and request.decoder == "dali":
        raise RunError(
            f"--decoder dali: these weights need frames scaled to a short side of {pixels.max_short_side}, "
            "which PyAV does; use auto, hybrid or pyav"
        )
    view = ViewSpec(
        config.frames,
        config.resolution,
        request.clips or views.clips,
        request.crops or views.crops,
        pixels.max_short_side,
    )
    return EvaluationTarget(
        source=request.source,
        weights=weights,
        manifest=manifest,
        dataset=dataset,
        view=view,
        rows=rows,
        names=output_names(dataset.class_names, config.num_classes if rows is None else len(rows)),
        mean=pixels.mean,
        std=pixels.std,
        precision=_precision(request, recipe, environment.device),
        batch=request.batch or (8 if recipe is None else recipe.evaluation.batch),
        workers=request.workers
        or (recipe.data.workers if recipe and recipe.data.workers != "auto" else None),
        decoder=request.decoder or ("auto" if recipe is None else recipe.data.decoder),
        storage=DIRECT if recipe is None else recipe.data.storage,
        bad_share=request.bad_share if request.bad_share is not None else recipe_bad_share,
        out=request.out or _folder(request.source, weights, manifest, view),
    )


def weights_digest(weights: SavedWeights) -> str:
    """SHA-256 of the model's configuration, preprocessing and tensors, in hexadecimal."""
    described = [asdict(weights.model.config), weights.preprocessing, weights.class_names]
    described[0].pop("recomputed_blocks")  # type: ignore[attr-defined]
    found = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
    for name, tensor in sorted(weights.model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _with_known_names(weights: SavedWeights) -> SavedWeights:
    """Add the Kinetics class names of a released model, identified by its number of outputs."""
    names: Sequence[str | None]
    outputs = weights.model.config.num_classes
    if outputs == len(kinetics710.class_names("k400_released")):
        names = kinetics710.class_names("k400_released")
    elif outputs == kinetics710.UNION:
        names = kinetics710.released_names()
    else:
        return weights
    return replace(weights, class_names=tuple(name or f"row {row}" for row, name in enumerate(names)))


def _manifest(request: EvaluationRequest, recipe: Recipe | None) -> Path:
    if request.manifest is not None:
        return request.manifest
    if recipe is None:
        raise RunError(f"{request.source} has no recipe that names a manifest: name one with --manifest FILE")
    if not recipe.data.val.exists():
        raise RunError(
            f"{recipe.data.val}, the validation manifest of the recipe in {request.source}, does not exist: "
            "name one with --manifest FILE"
        )
    return recipe.data.val


def _rows(weights: SavedWeights, wanted: tuple[str, ...], *, ordered: bool) -> tuple[int, ...] | None:
    """Rows of the head for the wanted classes, None for all. Raises RunError for unknown classes.

    ordered: whether the model may be the authors' Kinetics-710, many of whose rows are identified by order
    only.
    """
    known = weights.class_names
    if known == wanted:
        return None
    if ordered and len(known) == kinetics710.UNION:
        rows = kinetics710.released_rows().get(len(wanted))
        head = kinetics710.released_names()
        if rows is not None and agrees_with_order(head, rows, wanted, kinetics710.synonyms()):
            return rows
    return find_head_rows(known, wanted)


def _precision(request: EvaluationRequest, recipe: Recipe | None, device: torch.device) -> Precision:
    """The requested precision, else the recipe's if the device supports it."""
    if request.precision is not None:
        return choose_precision(request.precision, device)
    wanted = "auto" if recipe is None else recipe.engine.precision
    if wanted == "bf16" and device.type == "cpu":
        wanted = "auto"
    return choose_precision(wanted, device)


def _folder(source: Path, weights: SavedWeights, manifest: Path, view: ViewSpec) -> Path:
    """The default output folder: in `evaluations/` of the run or beside the file."""
    what = f"{manifest.stem}-{view.clips}x{view.crops}"
    if source.is_file():
        return source.parent / "evaluations" / f"{source.stem}-{what}"
    run = source.parent.parent if source.parent.name == "checkpoints" else source
    step = "" if weights.step is None else f"step-{weights.step:07d}-"
    return run / "evaluations" / f"{step}{what}"
