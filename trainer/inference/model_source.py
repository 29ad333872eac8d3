"""Reads a trained model from a run directory, a checkpoint or a file of weights."""

import dataclasses
import logging
from pathlib import Path

from torch import Tensor

from models import ModelError
from models.weights.files import open_weights
from models.weights.safetensors_header import shorten
from trainer.checkpoint.export import read_checkpoint
from trainer.checkpoint.metadata import STATE, TrainState, check_is_no_shard
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.weights import FORMAT, SavedWeights, described_model, load_weights
from trainer.errors import RunError
from trainer.monitoring.run_dir import RunDir
from trainer.system.files import find_number, read_json

logger = logging.getLogger(__name__)

RELEASED_COLOURS = {"mean": [0.45, 0.45, 0.45], "std": [0.225, 0.225, 0.225]}
"""Normalisation of the released models' clips, by channel."""
HUB_WEIGHTS = "model.safetensors"
"""The weights file in a folder of `export --format huggingface`."""


def open_model(
    source: Path,
    *,
    last: bool = False,
    frames: int | None = None,
    class_names: tuple[str, ...] | None = None,
) -> SavedWeights:
    """The model in evaluation mode, on the CPU in float32, with class names and preprocessing.

    Args:
        source: a run directory, a checkpoint, a `.safetensors` file or a Hugging Face folder of this program,
            or a released UniFormerV2 checkpoint.
        last: of a run directory, the weights of the last step; otherwise those of the best evaluation, if a
            file or a checkpoint has them.
        frames: frames per clip of a released checkpoint, which does not store them.
        class_names: one name per output, to replace those of the file.

    Raises:
        RunError: the source cannot be read, `frames` is missing or contradicts the model, the number of names
            differs from that of the outputs, or the names are those of the model in another order.
    """
    if source.is_dir():
        found = _from_folder(source, last)
    elif _is_own(source):
        found = load_weights(source)
    else:
        found = _from_released(source, frames)
    if frames is not None and frames != found.model.config.frames:
        raise RunError(f"{source} is a model of {found.model.config.frames} frames, not of {frames}")
    return found if class_names is None else _renamed(found, class_names, source)


def _from_folder(source: Path, last: bool) -> SavedWeights:
    if (source / HUB_WEIGHTS).is_file():
        return load_weights(source / HUB_WEIGHTS)
    folder = RunDir(source)
    if (source / STATE).exists():
        return _from_checkpoint(source)
    best = None if last else _best_weights(folder)
    if best is not None and best.is_dir():
        return _from_checkpoint(best)
    if best is not None or folder.weights.exists():
        file = best or folder.weights
        step = read_json(folder.summary).get("steps" if file == folder.weights else "best_step")
        return dataclasses.replace(load_weights(file), step=step if type(step) is int else None)
    return _from_checkpoint(source)


def _best_weights(folder: RunDir) -> Path | None:
    """The file or checkpoint with the weights of a run's best evaluation; None if there is none.

    It is the file that the summary names, unless a checkpoint of a continued run is more accurate.
    """
    summary = read_json(folder.summary)
    files = {file.name: file for file in (folder.weights, folder.best_weights) if file.exists()}
    file, top1 = files.get(str(summary.get("best_weights"))), find_number(summary, "best_top1")
    best = Retention(folder.checkpoints).best() if folder.checkpoints.is_dir() else None
    if best is not None and (file is None or top1 is None or best[1] > top1):
        return best[0]
    return None if top1 is None else file


def _from_checkpoint(source: Path) -> SavedWeights:
    return build_model(*read_checkpoint(source))


def build_model(state: TrainState, tensors: dict[str, Tensor]) -> SavedWeights:
    """The model of `read_checkpoint`'s metadata and weights, in evaluation mode on the CPU."""
    description = state.description
    model = described_model(description, tensors).to_empty(device="cpu")
    model.load_state_dict(tensors)
    return SavedWeights(
        model.eval(),
        tuple(description["class_names"]),
        description["preprocessing"],
        description["recipe"],
        state.step,
    )


def _is_own(source: Path) -> bool:
    """Whether a file has this program's format."""
    try:
        return open_weights(source).metadata.get("format_version") == FORMAT
    except ModelError as error:
        raise RunError(str(error)) from error


def _from_released(source: Path, frames: int | None) -> SavedWeights:
    from models.weights.names import find_tower
    from models.weights.released import describe_released, is_released, load_released

    check_is_no_shard(source)
    stored = open_weights(source)
    tower = None if is_released(stored.shapes) else find_tower(stored.shapes)
    if tower is not None:
        raise RunError(
            f"{source} is an image model, {tower.family}, without video classes. A training starts from it: "
            f"model.weights={source}"
        )
    if frames is None:
        raise RunError(
            f"{source} has weights without metadata, like the released checkpoints; give the number of "
            "frames per clip (--frames 8)"
        )
    try:
        is_bgr = describe_released(stored, frames=frames).config.temporal_downsample
        model = load_released(source, frames=frames, bgr_to_rgb=is_bgr)
    except ModelError as error:
        raise RunError(
            f"{source} is neither a model of this program nor a released UniFormerV2: {error}"
        ) from error
    if is_bgr:
        logger.warning(
            "%s was trained on BGR frames: its input channels are reversed, for this program's RGB", source
        )
    config = model.config
    preprocessing = {
        "frames": frames,
        "resolution": config.resolution,
        "sampling": "sparse",
        **RELEASED_COLOURS,
    }
    names = tuple(f"class {number}" for number in range(config.num_classes))
    return SavedWeights(model.eval(), names, preprocessing, {})


def _renamed(found: SavedWeights, class_names: tuple[str, ...], source: Path) -> SavedWeights:
    outputs = found.model.config.num_classes
    if len(class_names) != outputs:
        last = shorten(class_names[-1]) if class_names else "none"
        raise RunError(
            f"{source} has {outputs} outputs, but {len(class_names)} class names were given; the last is "
            f"{last}"
        )
    indices = {name: index for index, name in enumerate(found.class_names)}
    for index, name in enumerate(class_names):
        if indices.get(name, index) != index:
            raise RunError(
                f"the order of the given class names differs from that in {source}: {shorten(name)} is "
                f"number {index + 1} of the given names and {indices[name] + 1} of the model's. Omit "
                "--classes, or give new names in the order of the outputs"
            )
    return dataclasses.replace(found, class_names=class_names)
