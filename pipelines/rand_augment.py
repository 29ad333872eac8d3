"""RandAugment (Cubuk et al.) as numbers: which operations a clip goes through, and their arguments.

Pure NumPy. The fifteen operations are timm's "increasing" set, in which a larger magnitude always means a
stronger change; `pipelines/augment.py` carries them out. One draw holds for all frames of a clip.
"""

import re
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from . import DataError

MAX_MAGNITUDE = 10.0
ARGUMENTS = 6  # the longest argument list is an affine matrix of 2 x 3


class Operation(IntEnum):
    """What is done to a clip; NOTHING stands for an operation whose own chance did not come up.

    Rotation and both shears are one code: to the graph they are the same warp with another matrix. Likewise
    both translations.
    """

    NOTHING = 0
    AUTO_CONTRAST = 1
    EQUALIZE = 2
    INVERT = 3
    POSTERIZE = 4
    SOLARIZE = 5
    SOLARIZE_ADD = 6
    COLOR = 7
    CONTRAST = 8
    BRIGHTNESS = 9
    SHARPNESS = 10
    WARP = 11
    TRANSLATE = 12


@dataclass(frozen=True)
class Policy:
    """A parsed policy string.

    magnitude: 0..10. count: operations drawn, with replacement. magnitude_std: standard deviation of each
    operation's magnitude. probability: chance of each drawn operation to be carried out.
    """

    magnitude: float
    count: int
    magnitude_std: float
    probability: float


@lru_cache(maxsize=8)
def parse(text: str) -> Policy:
    """Read `rand-m7-n4-mstd0.5-inc1` and the like; `p` sets the chance of each operation.

    Raises DataError for anything else, naming the part.
    """
    head, *parts = text.split("-")
    values = {"m": 10.0, "n": 2.0, "mstd": 0.0, "inc": 0.0, "p": 0.5}
    if head != "rand":
        raise DataError(f"rand_augment '{text}': must start with 'rand-', e.g. rand-m7-n4-mstd0.5-inc1")
    for part in parts:
        match = re.fullmatch(r"(mstd|inc|m|n|p)(\d+(?:\.\d+)?)", part)
        if match is None:
            raise DataError(
                f"rand_augment '{text}': part '{part}' is not one of m<0..10>, n<count>, mstd<float>, inc1, "
                "p<0..1>"
            )
        values[match[1]] = float(match[2])
    if values["inc"] != 1.0:
        raise DataError(f"rand_augment '{text}': only the increasing operations are offered; add '-inc1'")
    for name, low, high in (("m", 0, MAX_MAGNITUDE), ("n", 1, 16), ("p", 0, 1)):
        if not low <= values[name] <= high:
            raise DataError(f"rand_augment '{text}': {name} must lie in {low}..{high:g}")
    if values["n"] != int(values["n"]):
        raise DataError(f"rand_augment '{text}': n must be a whole number")
    return Policy(values["m"], int(values["n"]), values["mstd"], values["p"])


def nothing() -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """No operation at all: arrays of shapes (0,) and (0, 6)."""
    return np.zeros(0, np.int32), np.zeros((0, ARGUMENTS), np.float32)


def draw(
    policy: Policy, rng: np.random.Generator, height: int, width: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Draw the operations for a clip of `height` x `width` pixels.

    Returns codes of shape (N,) and arguments of shape (N, 6), in the order they are carried out.
    """
    codes = np.zeros(policy.count, np.int32)
    arguments = np.zeros((policy.count, ARGUMENTS), np.float32)
    for place, choice in enumerate(rng.integers(0, len(_MAKERS), size=policy.count)):
        fires = rng.random() < policy.probability
        level = float(np.clip(rng.normal(policy.magnitude, policy.magnitude_std), 0, MAX_MAGNITUDE))
        sign = 1.0 if rng.random() < 0.5 else -1.0
        if fires:
            code, values = _MAKERS[choice](level / MAX_MAGNITUDE, sign, height, width)
            codes[place] = code
            arguments[place, : len(values)] = values
    return codes, arguments


Arguments = tuple[float, ...]


def _rotate(level: float, sign: float, height: int, width: int) -> tuple[Operation, Arguments]:
    """Up to 30 degrees about the middle of the frame."""
    angle = np.deg2rad(sign * level * 30)
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    x, y = width / 2, height / 2
    return Operation.WARP, (cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)


def _shear_x(level: float, sign: float, height: int, width: int) -> tuple[Operation, Arguments]:
    """Source column = column + factor * row, up to 0.3, about the top left corner."""
    return Operation.WARP, (1, sign * level * 0.3, 0, 0, 1, 0)


def _shear_y(level: float, sign: float, height: int, width: int) -> tuple[Operation, Arguments]:
    return Operation.WARP, (1, 0, 0, sign * level * 0.3, 1, 0)


def _translate_x(level: float, sign: float, height: int, width: int) -> tuple[Operation, Arguments]:
    """Up to 0.45 of the width, in whole pixels: the window's left edge in the source."""
    return Operation.TRANSLATE, (0, float(round(sign * level * 0.45 * width)))


def _translate_y(level: float, sign: float, height: int, width: int) -> tuple[Operation, Arguments]:
    return Operation.TRANSLATE, (float(round(sign * level * 0.45 * height)), 0)


def _enhancement(level: float, sign: float) -> tuple[float]:
    """Factor of colour, contrast, brightness and sharpness: 1 leaves the clip as it is."""
    return (max(0.1, 1 + sign * level * 0.9),)


_MAKERS = (
    lambda level, sign, height, width: (Operation.AUTO_CONTRAST, ()),
    lambda level, sign, height, width: (Operation.EQUALIZE, ()),
    lambda level, sign, height, width: (Operation.INVERT, ()),
    _rotate,
    lambda level, sign, height, width: (Operation.POSTERIZE, (_posterize_mask(4 - int(level * 4)),)),
    lambda level, sign, height, width: (Operation.SOLARIZE, (256 - min(256, int(level * 256)),)),
    lambda level, sign, height, width: (Operation.SOLARIZE_ADD, (min(128, int(level * 110)),)),
    lambda level, sign, height, width: (Operation.COLOR, _enhancement(level, sign)),
    lambda level, sign, height, width: (Operation.CONTRAST, _enhancement(level, sign)),
    lambda level, sign, height, width: (Operation.BRIGHTNESS, _enhancement(level, sign)),
    lambda level, sign, height, width: (Operation.SHARPNESS, _enhancement(level, sign)),
    _shear_x,
    _shear_y,
    _translate_x,
    _translate_y,
)


def _posterize_mask(bits: int) -> float:
    """The bit mask that keeps the `bits` highest bits; no bit at all leaves black."""
    return float(~(2 ** (8 - bits) - 1) & 0xFF)
