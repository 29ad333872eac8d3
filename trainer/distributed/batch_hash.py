"""A hash of the clips of a step, computed on their device without a host wait.

It depends on every bit of every clip and on its key, label and validity, but not on the order of clips, ranks
or micro-batches. Two different batches have the same hash with a probability of about 2**-32. The hash is not
cryptographic.
"""

import torch
from torch import Tensor

from pipelines.loader import ClipBatch

# Pixels whose 64-bit products are held at once: 1 MiB, which stays in a core's cache; 32 MiB keep a GPU busy.
_AT_ONCE_CPU, _AT_ONCE_GPU = 2**17, 2**22
_MULTIPLIERS = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # of SplitMix64, as int64
_GOLDEN = -0x61C8864680B583EB


def hash_clips(batch: ClipBatch) -> Tensor:
    """The sum of all clips' hashes modulo 2**64: int64 scalar on the clips' device, without a host wait.

    With the float32 bits x of a clip as int32, odd 64-bit weights w by pixel and v by plane (channel and
    frame), and SplitMix64's finaliser m, all modulo 2**64 (multilinear hashing, Lemire and Kaser 2014, in two
    levels):

        plane = sum over pixels of x * w
        clip  = m(sum over planes of m(plane) * v + m(key) + m(2 * label + valid))
    """
    clips = batch.clips.detach()
    planes = clips.view(torch.int32).flatten(-2).flatten(0, -2)  # B*3*T H*W
    by_pixel = _odd_weights(planes.shape[1], clips.device)
    rows = max(1, (_AT_ONCE_GPU if clips.is_cuda else _AT_ONCE_CPU) // planes.shape[1])
    sums = torch.cat([(part * by_pixel).sum(1) for part in planes.split(rows)])
    by_clip = _mixed(sums.view(len(clips), -1))  # B 3*T
    by_plane = _odd_weights(by_clip.shape[1], clips.device)
    about = _mixed(batch.keys) + _mixed(2 * batch.labels + batch.valid)
    return _mixed((by_clip * by_plane).sum(1) + about).sum()


def split_halves(value: Tensor) -> Tensor:
    """The upper and the lower 32 bits of an int64 as float64, (2,): sums of up to 2**21 such are exact."""
    return torch.stack([(value >> 32) & 0xFFFFFFFF, value & 0xFFFFFFFF]).double()


def format_hash(upper: float, lower: float) -> str:
    """Sums of `halves` as 16 hexadecimal digits of the sum of the values, modulo 2**64."""
    return f"{((int(upper) << 32) + int(lower)) % 2**64:016x}"


def _odd_weights(count: int, device: torch.device) -> Tensor:
    return _mixed(torch.arange(1, count + 1, device=device) * _GOLDEN) | 1


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's finaliser: every input bit flips every output bit with probability near one half."""
    for shift, multiplier in zip((30, 27), _MULTIPLIERS, strict=True):
        x = (x ^ _shifted(x, shift)) * multiplier
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A logical right shift, which torch does not have for int64."""
    return (x >> bits) & (2 ** (64 - bits) - 1)
