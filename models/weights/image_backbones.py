"""Loads the weights of an image ViT into the backbone of a video model."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from models.config import ModelError, UniFormerV2Config
from models.position import grid_of, resize_position_embedding
from models.uniformerv2 import UniFormerV2
from models.weights.files import StoredWeights, WeightSource, format_list, format_problems, open_weights
from models.weights.names import ImageTower, find_tower, guess_origin
from models.weights.safetensors_header import shorten

logger = logging.getLogger(__name__)

_QKV_PARTS = 3


@dataclass(frozen=True)
class ImageWeightsReport:
    """How image weights were loaded."""

    loaded: tuple[str, ...]
    """The model's tensors with image weights."""
    adapted: tuple[str, ...]
    """Those of `loaded` that were inflated or interpolated."""
    left_out: tuple[str, ...]
    """Names in the source without a tensor in the model: last norm and projection or head."""
    kept: tuple[str, ...]
    """The model's tensors that keep their initialisation: those of the video parts."""


def load_image_weights(model: UniFormerV2, source: WeightSource | StoredWeights) -> ImageWeightsReport:
    """Load an image ViT's weights into the backbone of `model`.

    source: a `.safetensors` or `torch.save` file or a state dict: a CLIP model as open_clip and OpenAI name
    it (`visual.conv1.weight`) or as Hugging Face does (`vision_model.embeddings.class_embedding`; query,
    key and value are concatenated), its visual tower alone, or a plain ViT as timm names it (not DeiT III
    or BEiT, which have layer scale). A text tower and `logit_scale` are ignored.

    A 2-D patch weight is inflated at the centre tap with zeros in the other taps, so that a repeated image
    gives the image model's tokens. The position embedding is interpolated to the model's grid, with a log
    message.

    The model changes only if everything fits. Otherwise raises `ModelError` with the probable origin of the
    weights and at most ten missing, unexpected and mis-shaped tensors, before a tensor is read, or for
    weights that are not finite.
    """
    targets = model.state_dict()
    weights, tower, report = _match(targets, model.config.grid, source)
    tensors = weights.read(name for names in tower.parts.values() for name in names)
    weights.read(tower.prefix + name for name in tower.left_out if tower.prefix + name in weights.shapes)
    loaded: dict[str, Tensor] = {}
    for own, names in tower.parts.items():
        tensor = torch.cat([tensors.pop(name) for name in names]) if len(names) > 1 else tensors.pop(names[0])
        loaded[own] = _fit(own, tensor, targets[own], model.config.grid)
    model.load_state_dict(loaded, strict=False)
    logger.info("image weights: %d tensors loaded, %d left out", len(loaded), len(tower.left_out))
    return report


def check_image_weights(
    config: UniFormerV2Config, source: WeightSource | StoredWeights
) -> ImageWeightsReport:
    """The report of `load_image_weights` for these weights, without reading a tensor of a safetensors file.

    Raises ModelError for weights that it would refuse for their names, shapes or dtypes.
    """
    with torch.device("meta"):
        targets = UniFormerV2(config).state_dict()
    return _match(targets, config.grid, source)[2]


def _match(
    targets: Mapping[str, Tensor], grid: int, source: WeightSource | StoredWeights
) -> tuple[StoredWeights, ImageTower, ImageWeightsReport]:
    """The opened weights, their image tower and the report of loading them. targets: the model's tensors."""
    weights = source if isinstance(source, StoredWeights) else open_weights(source)
    tower = find_tower(weights.shapes)
    if tower is None:
        raise ModelError(_not_known(weights))
    _check_fit(weights, tower, targets, grid)
    adapted = tuple(
        own
        for own, names in tower.parts.items()
        if sum(weights.shapes[name].numel() for name in names) != targets[own].numel()
    )
    kept = tuple(name for name in targets if name not in tower.parts)
    return weights, tower, ImageWeightsReport(tuple(tower.parts), adapted, tower.left_out, kept)


def _not_known(weights: StoredWeights) -> str:
    guess = guess_origin(weights.shapes)
    origin = f"it looks like {guess}" if guess else "its names are unknown"
    return (
        f"{weights.origin} holds no image weights that can be loaded; {origin}. Supported: CLIP or its "
        "visual tower as open_clip, OpenAI or Hugging Face names it, and a plain ViT as timm names it. "
        f"The file has {format_list([shorten(name) for name in weights.shapes])}"
    )


def _check_fit(weights: StoredWeights, tower: ImageTower, targets: Mapping[str, Tensor], grid: int) -> None:
    """Raises ModelError for missing and unexpected tensors and for wrong shapes and dtypes."""
    unexpected = [f"unexpected {shorten(name)}" for name in tower.unexpected]
    wrong, missing = [], []
    for own, names in tower.parts.items():
        if own not in targets:
            unexpected += [f"unexpected {shorten(name.removeprefix(tower.prefix))}" for name in names]
            continue
        sources = {name: weights.shapes[name] for name in names}
        wrong += _wrong_types(sources)
        wrong += _wrong_shapes(own, sources, targets[own], grid)
    for own in targets:
        if own not in tower.parts and _comes_from_image(own):
            missing.append(f"missing {own}")
    if not (unexpected or wrong or missing):
        return
    guess = guess_origin(weights.shapes)
    seems = f"; it looks like {guess}" if guess and unexpected else ""
    raise ModelError(
        f"the image weights do not fit the model: {weights.origin}, read as {tower.family}{seems}\n"
        f"  {_dimensions(weights, tower, targets)}{format_problems(wrong, missing, unexpected)}"
    )


def _wrong_types(sources: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{shorten(name)} holds {str(tensor.dtype).removeprefix('torch.')}, not floating-point numbers"
        for name, tensor in sources.items()
        if not tensor.is_floating_point()
    ]


def _wrong_shapes(own: str, sources: Mapping[str, Tensor], target: Tensor, grid: int) -> list[str]:
    """Messages for wrong shapes. sources: the tensors for the model's tensor `own`, on the meta device."""
    expected = tuple(target.shape)
    if any(".self_attn." in name for name in sources) and ".qkv." in own:
        expected = (expected[0] // _QKV_PARTS, *expected[1:])
        if len(sources) != _QKV_PARTS:
            return [
                f"{own} needs q_proj, k_proj and v_proj; there is only {', '.join(map(shorten, sources))}"
            ]
    if own == "patch_embedding.weight" and all(tensor.dim() == 4 for tensor in sources.values()):
        expected = (*expected[:2], *expected[3:])
    return [
        f"{shorten(name)} has shape {shorten(tuple(tensor.shape))}, expected is {expected}"
        for name, tensor in sources.items()
        if not _fits(own, tensor, expected, grid)
    ]


def _fits(own: str, tensor: Tensor, expected: tuple[int, ...], grid: int) -> bool:
    """Whether `_fit` can convert the tensor to the expected shape."""
    shape = tuple(tensor.shape)
    if own == "class_token":
        return tensor.numel() == expected[0] and len(shape) >= 1
    if own == "position_embedding":
        if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] != 1) or shape[-1] != expected[-1]:
            return False
        grid_of(tensor.flatten(0, -2))
        return True
    return shape == expected


def _dimensions(weights: StoredWeights, tower: ImageTower, targets: Mapping[str, Tensor]) -> str:
    """The dimensions of the file and of the model, as text."""
    patch = weights.shapes[tower.parts["patch_embedding.weight"][0]]
    in_file = f"width {patch.shape[0]}, patches of {patch.shape[-1]}, " if patch.dim() else ""
    target = targets["patch_embedding.weight"]
    in_model = f"width {target.shape[0]}, patches of {target.shape[-1]}, {_depth(targets)} blocks"
    return f"in the file: {in_file}{_depth(tower.parts)} blocks; in the model: {in_model}"


def _depth(names: Iterable[str]) -> int:
    return len({name.split(".")[1] for name in names if name.startswith("blocks.")})


def _comes_from_image(own: str) -> bool:
    is_backbone = own.startswith(
        ("patch_embedding.", "class_token", "position_embedding", "ln_pre.", "blocks.")
    )
    return is_backbone and ".local_" not in own


def _fit(own: str, tensor: Tensor, target: Tensor, grid: int) -> Tensor:
    """The tensor inflated, flattened or interpolated to the shape of its target."""
    if own == "patch_embedding.weight" and tensor.dim() == 4:
        return _inflate(tensor, target.shape[2])
    if own == "class_token":
        return tensor.flatten()
    if own == "position_embedding":
        return resize_position_embedding(tensor.flatten(0, -2), grid)
    return tensor


def _inflate(weight: Tensor, taps: int) -> Tensor:  # C 3 p p -> C 3 taps p p
    inflated = torch.zeros(*weight.shape[:2], taps, *weight.shape[2:], dtype=weight.dtype)
    inflated[:, :, taps // 2] = weight
    return inflated
