"""Interpolation of position embeddings and of tables of relative positions to another resolution."""

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
    grid = round(max(0, patches) ** 0.5)
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


def table_grid_of(table: Tensor) -> int:
    """Patches along one side, for a table of relative positions of (2 g - 1)² + 3 rows; raises ModelError for
    another number of rows."""
    offsets = round(max(0, table.shape[0] - 3) ** 0.5)
    if offsets < 1 or offsets % 2 == 0 or offsets**2 + 3 != table.shape[0]:
        raise ModelError(f"a table of {table.shape[0]} relative positions is not that of a square grid")
    return (offsets + 1) // 2


def interpolate_position_table(table: Tensor, grid: int) -> Tensor:
    """Bicubic interpolation to `grid` x `grid` patches: (2g-1)²+3 heads -> (2*grid-1)²+3 heads.

    The three rows for the class token are kept.
    """
    old, new = 2 * table_grid_of(table) - 1, 2 * grid - 1
    if old == new:
        return table
    image = table[:-3].float().T.unflatten(1, (old, old)).unsqueeze(0)  # 1 heads offsets offsets
    image = F.interpolate(image, size=(new, new), mode="bicubic", align_corners=False)
    return torch.cat([image.squeeze(0).flatten(1).T.to(table.dtype), table[-3:]])


def with_class_row(position_embedding: Tensor) -> Tensor:  # g*g C or 1+g*g C -> 1+g*g C
    """The embedding with a row for the class token: zero where it has none, as in DeiT III."""
    if not lacks_class_row(position_embedding):
        return position_embedding
    return F.pad(position_embedding, (0, 0, 1, 0))


def lacks_class_row(position_embedding: Tensor) -> bool:
    """Whether the rows are those of a square grid without a class token."""
    rows = position_embedding.shape[0]
    return rows > 0 and round(rows**0.5) ** 2 == rows
