"""Weights of an image ViT into the backbone of a video model."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from models.config import ModelError, UniFormerV2Config
from models.position import grid_of, resize_position_embedding
from models.uniformerv2 import UniFormerV2
from models.weights.files import StoredWeights, WeightSource, listed, open_weights
from models.weights.names import ImageTower, find_tower, guess_origin
from models.weights.safetensors_header import shorten

logger = logging.getLogger(__name__)

_MOST_PROBLEMS = 10
_QKV_PARTS = 3


@dataclass(frozen=True)
class ImageWeightsReport:
    """What became of the image weights."""

    loaded: tuple[str, ...]
    """Names of the model's tensors that now hold image weights."""
    adapted: tuple[str, ...]
    """Those of `loaded` that changed shape on the way: inflated or interpolated."""
    left_out: tuple[str, ...]
    """Names in the source that the model has no place for: last norm and projection or head."""
    kept: tuple[str, ...]
    """Names of the model's tensors that keep their initialisation: what video adds."""


def load_image_weights(model: UniFormerV2, source: WeightSource | StoredWeights) -> ImageWeightsReport:
    """Fills the backbone of `model` with an image ViT's weights, and says what it did.

    `source` is a `.safetensors` or `torch.save` file or a state dict: a CLIP model as open_clip and OpenAI
    name it (`visual.conv1.weight`) or as Hugging Face does (`vision_model.embeddings.class_embedding`; its
    query, key and value are joined), its visual tower alone, or a plain ViT as timm names it (not DeiT III or
    BEiT, whose layer scale has no place here). A text tower and `logit_scale` are passed over. A 2-D patch
    weight is inflated at the centre tap, the other taps zero, so that one image repeated gives the image
    model's tokens. The position embedding is interpolated to the model's grid, which the log says.

    The model is changed only if everything fits; otherwise `ModelError` says whose weights they seem to be,
    and lists missing, unexpected and mis-shaped tensors, at most ten. Names and shapes are compared before a
    tensor is read. Weights that are not finite are refused.
    """
    weights = source if isinstance(source, StoredWeights) else open_weights(source)
    targets = model.state_dict()
    grid = model.config.grid
    tower = _tower_that_fits(weights, targets, grid)
    tensors = weights.read(name for names in tower.parts.values() for name in names)
    weights.read(tower.prefix + name for name in tower.left_out if tower.prefix + name in weights.shapes)
    loaded: dict[str, Tensor] = {}
    adapted = []
    for own, names in tower.parts.items():
        tensor = torch.cat([tensors.pop(name) for name in names]) if len(names) > 1 else tensors.pop(names[0])
        loaded[own] = _fit(own, tensor, targets[own], grid)
        if loaded[own].numel() != tensor.numel():
            adapted.append(own)
    model.load_state_dict(loaded, strict=False)
    logger.info("image weights: %d tensors loaded, %d left out", len(loaded), len(tower.left_out))
    kept = tuple(name for name in targets if name not in loaded)
    return ImageWeightsReport(tuple(loaded), tuple(adapted), tower.left_out, kept)


def check_image_weights(
    config: UniFormerV2Config, source: WeightSource | StoredWeights
) -> ImageWeightsReport:
    """What `load_image_weights` would do with these weights; no tensor of a safetensors file is read.

    Raises ModelError for weights that it would refuse by their names, shapes and types.
    """
    with torch.device("meta"):
        targets = UniFormerV2(config).state_dict()
    weights = source if isinstance(source, StoredWeights) else open_weights(source)
    tower = _tower_that_fits(weights, targets, config.grid)
    adapted = tuple(
        own
        for own, names in tower.parts.items()
        if sum(weights.shapes[name].numel() for name in names) != targets[own].numel()
    )
    kept = tuple(name for name in targets if name not in tower.parts)
    return ImageWeightsReport(tuple(tower.parts), adapted, tower.left_out, kept)


def _tower_that_fits(weights: StoredWeights, targets: Mapping[str, Tensor], grid: int) -> ImageTower:
    tower = find_tower(weights.shapes)
    if tower is None:
        raise ModelError(_not_known(weights))
    _check_fit(weights, tower, targets, grid)
    return tower


def _not_known(weights: StoredWeights) -> str:
    guess = guess_origin(weights.shapes)
    looks = f"it looks like {guess}" if guess else "whose its names are is not known"
    return (
        f"{weights.origin} holds no image weights that can be loaded; {looks}. What can: the visual tower of "
        "CLIP as open_clip, OpenAI or Hugging Face names it, a whole CLIP, or a plain ViT as timm names it. "
        f"The file has {listed([shorten(name) for name in weights.shapes])}"
    )


def _check_fit(weights: StoredWeights, tower: ImageTower, targets: Mapping[str, Tensor], grid: int) -> None:
    """Raises ModelError for anything that is missing, unexpected, or of a shape or type that does not fit."""
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
    every = [item for row in zip_longest(wrong, missing, unexpected) for item in row if item is not None]
    more = len(every) - _MOST_PROBLEMS
    lines = every[:_MOST_PROBLEMS] + ([f"... and {more:,} more"] if more > 0 else [])
    guess = guess_origin(weights.shapes)
    seems = f"; it looks like {guess}" if guess and unexpected else ""
    raise ModelError(
        f"the image weights do not fit the model: {weights.origin}, read as {tower.family}{seems}\n"
        f"  {_dimensions(weights, tower, targets)}\n  " + "\n  ".join(lines)
    )


def _wrong_types(sources: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{shorten(name)} holds {str(tensor.dtype).removeprefix('torch.')}, not floating-point numbers"
        for name, tensor in sources.items()
        if not tensor.is_floating_point()
    ]


def _wrong_shapes(own: str, sources: Mapping[str, Tensor], target: Tensor, grid: int) -> list[str]:
    """sources: the tensors that make one of ours, on the meta device."""
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
    """Whether `_fit` can give it the expected shape."""
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
    """The size of both, where it differs, says more than a list of tensors."""
    patch = weights.shapes[tower.parts["patch_embedding.weight"][0]]
    theirs = f"width {patch.shape[0]}, " if patch.dim() else ""
    theirs += f"patches of {patch.shape[-1]}, " if patch.dim() else ""
    target = targets["patch_embedding.weight"]
    ours = f"width {target.shape[0]}, patches of {target.shape[-1]}, {_depth(targets)} blocks"
    return f"in the file: {theirs}{_depth(tower.parts)} blocks; in the model: {ours}"


def _depth(names: Iterable[str]) -> int:
    return len({name.split(".")[1] for name in names if name.startswith("blocks.")})


def _comes_from_image(own: str) -> bool:
    is_backbone = own.startswith(
        ("patch_embedding.", "class_token", "position_embedding", "ln_pre.", "blocks.")
    )
    return is_backbone and ".local_" not in own


def _fit(own: str, tensor: Tensor, target: Tensor, grid: int) -> Tensor:
    """The tensor in the shape of its target where there is a way to get there, else as it is."""
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
