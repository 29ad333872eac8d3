"""Interpolation of position embeddings to another resolution."""

import logging

import torch
from torch import Tensor
from torch.nn import functional as F

from models.config import ModelError

logger = logging.getLogger(__name__)


def grid_of(position_embedding: Tensor) -> int:
    """Patches along one side of an embedding of 1 + grid² tokens; raises ModelError if that is not a
    square."""
    patches = position_embedding.shape[0] - 1
    grid = round(patches**0.5)
    if patches < 1 or grid * grid != patches:
        raise ModelError(f"a position embedding of {patches} patches is not a square grid")
    return grid


def resize_position_embedding(position_embedding: Tensor, grid: int) -> Tensor:  # 1+g*g C -> 1+grid*grid C
    """`interpolate_position_embedding`, logged if the grid changes."""
    old = grid_of(position_embedding)
    if old != grid:
        logger.warning("position embedding interpolated from %dx%d to %dx%d patches", old, old, grid, grid)
    return interpolate_position_embedding(position_embedding, grid)


def interpolate_position_embedding(position_embedding: Tensor, grid: int) -> Tensor:
    """Bicubic interpolation of the patches to `grid` x `grid`: 1+g*g C -> 1+grid*grid C."""
    old = grid_of(position_embedding)
    if old == grid:
        return position_embedding
    class_token, patches = position_embedding[:1], position_embedding[1:]
    image = patches.float().T.unflatten(1, (old, old)).unsqueeze(0)  # 1 C g g
    image = F.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False)
    resized = image.squeeze(0).flatten(1).T.to(position_embedding.dtype)  # grid*grid C
    return torch.cat([class_token, resized])
