"""A hash of the clips of a step, computed on their device without a host wait.

It depends on every bit of every clip and on its key, label and validity, but not on the order of clips, ranks
or micro-batches. Two different batches have the same hash with a probability of about 2**-32. The hash is not
cryptographic.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Pixels whose 64-bit products are held at once: 1 MiB, which stays in a core's cache; 32 MiB keep a GPU busy.
_AT_ONCE_CPU, _AT_ONCE_GPU = 2**17, 2**22
_MULTIPLIERS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # of SplitMix64, as int64
_GOLDEN = -0x61C8864680B583EB


def hash_clips(clips: Tensor, labels: Tensor, valid: Tensor, keys: Tensor) -> Tensor:
    """The sum of all clips' hashes modulo 2**64: int64 scalar on the clips' device, without a host wait.

    The arguments are those of a `ClipBatch`.

    With the float32 bits x of a clip as int32, odd 64-bit weights w by pixel and v by plane (channel and
    frame), and SplitMix64's finaliser m, all modulo 2**64 (multilinear hashing, Lemire and Kaser 2014, in two
    levels):

        plane = sum over pixels of x * w
        clip  = m(sum over planes of m(plane) * v + m(key) + m(2 * label + valid))
    """
    planes = clips.detach().view(torch.int32).flatten(-2).flatten(0, -2)  # B*3*T H*W
    sums = _plane_sums(planes) if clips.is_cuda else _plane_sums_cpu(planes)
    by_clip = _mixed(sums.view(len(clips), -1))  # B 3*T
    by_plane = _odd_weights(torch.arange(1, by_clip.shape[1] + 1, device=clips.device))
    about = _mixed(keys) + _mixed(2 * labels + valid)
    return _mixed((by_clip * by_plane).sum(1) + about).sum()


def _plane_sums(planes: Tensor) -> Tensor:
    by_pixel = _odd_weights(torch.arange(1, planes.shape[1] + 1, device=planes.device))
    rows = max(1, _AT_ONCE_GPU // planes.shape[1])
    return torch.cat([(part * by_pixel).sum(1) for part in planes.split(rows)])


def _plane_sums_cpu(planes: Tensor) -> Tensor:
    """With NumPy, which takes two thirds of torch's CPU time, and no thread of the model."""
    pixels = planes.numpy()
    by_pixel = _pixel_weights_cpu(pixels.shape[1])
    rows = max(1, min(len(pixels), _AT_ONCE_CPU // pixels.shape[1]))
    products = np.empty((rows, pixels.shape[1]), np.int64)
    sums = np.empty(len(pixels), np.int64)
    for start in range(0, len(pixels), rows):
        part = pixels[start : start + rows]
        np.multiply(part, by_pixel, out=products[: len(part)])
        products[: len(part)].sum(1, out=sums[start : start + rows])
    return torch.from_numpy(sums)


@lru_cache(maxsize=2)
def _pixel_weights_cpu(count: int) -> NDArray[np.int64]:
    weights: NDArray[np.int64] = _odd_weights(np.arange(1, count + 1, dtype=np.int64))
    return weights


def split_halves(value: Tensor) -> Tensor:
    """The upper and the lower 32 bits of an int64 as float64, (2,): sums of up to 2**21 such are exact."""
    return torch.stack([(value >> 32) & 0xFFFFFFFF, value & 0xFFFFFFFF]).double()


def format_hash(upper: float, lower: float) -> str:
    """Sums of `halves` as 16 hexadecimal digits of the sum of the values, modulo 2**64."""
    return f"{((int(upper) << 32) + int(lower)) % 2**64:016x}"


def _odd_weights(numbers: Any) -> Any:
    return _mixed(numbers * _GOLDEN) | 1


def _mixed(x: Any) -> Any:
    """SplitMix64's finaliser: every input bit flips every output bit with probability near one half.

    x: int64, a tensor or an array.
    """
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        x = (x ^ _shifted(x, shift)) * multiplier
    return x ^ _shifted(x, 31)


def _shifted(x: Any, bits: int) -> Any:
    """A logical right shift, which neither has for int64."""
    return (x >> bits) & (2 ** (64 - bits) - 1)
