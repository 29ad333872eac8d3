"""Draws a heat map over a frame, in colours that colour-blind people can distinguish."""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from trainer.inspection.contact_sheet import Picture

_COLOURS = "viridis"  # lightness rises evenly: readable in grey and with colour blindness
_DARKEST, _BRIGHTEST = 40, 190  # grey levels of the dimmed frame, so that the map is brighter
_COVER = 0.8  # opacity of the highest value


def draw_overlay(frame: Picture, values: NDArray[np.floating]) -> Picture:
    """A grey, dimmed frame under a viridis map. values: (H, W), 0..1; a higher value is more opaque."""
    import matplotlib

    grey = (frame @ np.array([0.299, 0.587, 0.114])) * ((_BRIGHTEST - _DARKEST) / 255) + _DARKEST
    cover = _COVER * values[..., None]
    colours = np.asarray(matplotlib.colormaps[_COLOURS](values))[..., :3] * 255
    mixed = (1 - cover) * grey[..., None] + cover * colours
    return mixed.round().clip(0, 255).astype(np.uint8)


def legend(width: int, height: int) -> Picture:
    """The map's colours over grey, from 0 on the left to 1 on the right."""
    values = np.broadcast_to(np.linspace(0, 1, width), (height, width))
    return draw_overlay(np.full((height, width, 3), 128, np.uint8), values)


def upsample(maps: Tensor, frames: int, size: int) -> NDArray[np.float32]:  # T' h w -> T H W
    """Upsample a map of patches to pixels and scale its maximum to 1; a map of zeros is not scaled.

    A model that halves the number of frames has one map for two frames.
    """
    each = maps.repeat_interleave(frames // len(maps), dim=0)
    pixels = F.interpolate(each[:, None].float(), (size, size), mode="bilinear")[:, 0]
    highest = pixels.max()
    return (pixels / highest if highest > 0 else pixels).clamp(0, 1).cpu().numpy()
