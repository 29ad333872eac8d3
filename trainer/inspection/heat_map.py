"""A map over a frame, in colours that everybody can tell apart."""

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from trainer.inspection.contact_sheet import Picture

_COLOURS = "viridis"  # its lightness rises evenly, so it reads in grey and with any colour blindness
_DARKEST, _BRIGHTEST = 40, 190  # grey levels of the frame: what is bright in the picture is then the map
_COVER = 0.8  # how much of the frame the highest value covers


def draw_overlay(frame: Picture, values: NDArray[np.floating]) -> Picture:
    """A grey, dimmed frame under a map of 0..1, (H, W): the higher, the more of viridis stands over it."""
    grey = (frame @ np.array([0.299, 0.587, 0.114])) * ((_BRIGHTEST - _DARKEST) / 255) + _DARKEST
    cover = _COVER * values[..., None]
    mixed = (1 - cover) * grey[..., None] + cover * _coloured(values)
    return mixed.round().clip(0, 255).astype(np.uint8)


def legend(width: int, height: int) -> Picture:
    """The map's colours over a grey frame, from 0 on the left to 1 on the right."""
    values = np.broadcast_to(np.linspace(0, 1, width), (height, width))
    return draw_overlay(np.full((height, width, 3), 128, np.uint8), values)


def upsample(maps: Tensor, frames: int, size: int) -> NDArray[np.float32]:  # T' h w -> T H W
    """A map of patches as one of pixels, with its highest value at 1; a map of zeros stays one.

    A model that halves the frames has one map for two of them.
    """
    each = maps.repeat_interleave(frames // len(maps), dim=0)
    pixels = F.interpolate(each[:, None].float(), (size, size), mode="bilinear")[:, 0]
    highest = pixels.max()
    return (pixels / highest if highest > 0 else pixels).clamp(0, 1).cpu().numpy()


def _coloured(values: NDArray[np.floating]) -> NDArray[np.floating]:  # H W -> H W 3, 0..255
    import matplotlib

    return np.asarray(matplotlib.colormaps[_COLOURS](values))[..., :3] * 255
