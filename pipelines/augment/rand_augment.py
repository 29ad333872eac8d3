"""RandAugment (Cubuk et al.) as numbers: which operations a clip goes through, and their arguments.

Pure NumPy. Policies are read, and operations and magnitudes drawn, as timm does; the fifteen operations are
its "increasing" set, in which a larger magnitude always means a stronger change. `augment/dali_nodes.py`
applies them. One draw holds for all frames of a clip.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from pipelines.errors import DataError

MAX_MAGNITUDE = 10
UNIFORM_ABOVE = 100  # a spread of the magnitude above this means: uniform between 0 and the magnitude
MOST_OPERATIONS = 16  # each is a branch of the graph


class Operation(IntEnum):
    """What is done to a clip; NOTHING fills the places that a clip leaves empty.

    Rotation and both shears are one code: to the graph they are the same warp with another matrix.
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
    SHARPNESS_AT_EDGE = 11  # the same, where what is needed reaches the edge of the frame
    WARP = 12
    TRANSLATE_X = 13
    TRANSLATE_Y = 14


class DrawnOperation(NamedTuple):
    """One operation on full frames.

    arguments: a bit mask (posterize); a level 0..255 (solarize) or amount (solarize add); a factor, 1 for no
    change (colour, contrast, brightness, sharpness); source position = 2 x 3 matrix times target position,
    row by row, in pixels from the corner of the frame (warp); source minus target position in pixels
    (translate).
    """

    operation: Operation
    arguments: tuple[float, ...] = ()


@dataclass(frozen=True)
class Policy:
    """A parsed policy string.

    magnitude: 0..10 in common use. count: operations drawn, with replacement. magnitude_std: standard
    deviation of each operation's magnitude; infinite for a uniform one. probability: chance of each drawn
    operation to be carried out. magnitude_max: what magnitudes are clipped to.
    """

    magnitude: float
    count: int
    magnitude_std: float
    probability: float
    magnitude_max: float = MAX_MAGNITUDE


WHOLE = r"\d+"
DECIMAL = r"\d+(?:\.\d+)?"
PARTS = {"m": WHOLE, "n": WHOLE, "mstd": DECIMAL, "mmax": WHOLE, "inc": WHOLE, "p": DECIMAL}


@lru_cache(maxsize=8)
def parse_policy(text: str) -> Policy:
    """Read `rand-m7-n4-mstd0.5-inc1` and the like, with timm's meaning and defaults.

    m: magnitude, 10 by default. n: operations, 2. mstd: spread of the magnitude, 0; above 100: uniform from 0
    to m. mmax: largest magnitude, 10. p: chance of each operation, 0.5. inc1 must be there.

    Raises DataError for anything else, naming the part.
    """
    head, *parts = text.split("-")
    if head != "rand":
        raise DataError(f"rand_augment '{text}': must start with 'rand-', e.g. rand-m7-n4-mstd0.5-inc1")
    values = {"m": 10.0, "n": 2.0, "mstd": 0.0, "mmax": 0.0, "inc": 0.0, "p": 0.5}
    for part in parts:
        name, value = _split(text, part)
        values[name] = value
    if not values["inc"]:
        raise DataError(f"rand_augment '{text}': only the increasing operations are offered; add '-inc1'")
    if not 1 <= values["n"] <= MOST_OPERATIONS:
        raise DataError(f"rand_augment '{text}': n must lie in 1..{MOST_OPERATIONS}")
    if values["p"] > 1:
        raise DataError(f"rand_augment '{text}': p must lie in 0..1")
    return Policy(
        magnitude=values["m"],
        count=int(values["n"]),
        magnitude_std=values["mstd"] if values["mstd"] <= UNIFORM_ABOVE else float("inf"),
        probability=values["p"],
        magnitude_max=values["mmax"] or MAX_MAGNITUDE,
    )


def _split(text: str, part: str) -> tuple[str, float]:
    """Name and value of one part of a policy."""
    match = re.fullmatch(r"([a-z]+)(.*)", part)
    name, value = match.groups() if match else (part, "")
    if name.startswith("t") or name == "w":
        raise DataError(
            f"rand_augment '{text}': part '{part}' chooses another set or weighting of operations, which is "
            "not offered; leave it out for the fifteen increasing operations, all equally likely"
        )
    if name not in PARTS:
        raise DataError(
            f"rand_augment '{text}': part '{part}' is not one of m<0..10>, n<count>, mstd<number>, "
            "mmax<magnitude>, inc1, p<0..1>"
        )
    if not re.fullmatch(PARTS[name], value):
        kind = "whole number" if PARTS[name] == WHOLE else "number"
        raise DataError(f"rand_augment '{text}': part '{part}' must be '{name}' and a {kind}")
    return name, float(value)


def draw_operations(
    policy: Policy, rng: np.random.Generator, height: int, width: int
) -> list[DrawnOperation]:
    """Draw the operations for a clip of `height` x `width` pixels: those that fire, in their order."""
    drawn = []
    makers = tuple(OPERATION_FACTORIES.values())
    for choice in rng.integers(0, len(makers), size=policy.count):
        fires = rng.random() < policy.probability
        level = draw_magnitude(policy, rng) / MAX_MAGNITUDE
        sign = 1.0 if rng.random() < 0.5 else -1.0
        if fires:
            drawn.append(makers[choice](level, sign, height, width))
    return [each for each in drawn if each.operation != Operation.NOTHING]


def draw_magnitude(policy: Policy, rng: np.random.Generator) -> float:
    """The magnitude of one operation, 0 to `policy.magnitude_max`."""
    if np.isinf(policy.magnitude_std):
        magnitude = rng.uniform(0, policy.magnitude)
    else:
        magnitude = rng.normal(policy.magnitude, policy.magnitude_std)
    return float(np.clip(magnitude, 0, policy.magnitude_max))


def _rotate(level: float, sign: float, height: int, width: int) -> DrawnOperation:
    """Up to 30 degrees about the middle of the frame, against the clock where positive."""
    angle = np.deg2rad(sign * level * 30)
    cos, sin = float(np.cos(angle)), float(np.sin(angle))
    x, y = width / 2, height / 2
    return DrawnOperation(Operation.WARP, (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y))


def _shear_x(level: float, sign: float, height: int, width: int) -> DrawnOperation:
    """Source column = column + factor * row, up to 0.3, about the top left corner."""
    return DrawnOperation(Operation.WARP, (1, sign * level * 0.3, 0, 0, 1, 0))


def _shear_y(level: float, sign: float, height: int, width: int) -> DrawnOperation:
    return DrawnOperation(Operation.WARP, (1, 0, 0, sign * level * 0.3, 1, 0))


def _translate_x(level: float, sign: float, height: int, width: int) -> DrawnOperation:
    """Up to 0.45 of the width."""
    return DrawnOperation(Operation.TRANSLATE_X, (sign * level * 0.45 * width,))


def _translate_y(level: float, sign: float, height: int, width: int) -> DrawnOperation:
    return DrawnOperation(Operation.TRANSLATE_Y, (sign * level * 0.45 * height,))


def _posterize(level: float, sign: float, height: int, width: int) -> DrawnOperation:
    """Keep the 4 to 0 highest bits; no bit at all leaves black."""
    bits = max(0, 4 - int(level * 4))
    return DrawnOperation(Operation.POSTERIZE, (~(2 ** (8 - bits) - 1) & 0xFF,))


def _solarize(level: float, sign: float, height: int, width: int) -> DrawnOperation:
    """Invert from a level on that sinks from 256, which no pixel reaches, to 0."""
    threshold = 256 - min(256, int(level * 256))
    return (
        DrawnOperation(Operation.SOLARIZE, (threshold,))
        if threshold < 256
        else DrawnOperation(Operation.NOTHING)
    )


def _solarize_add(level: float, sign: float, height: int, width: int) -> DrawnOperation:
    return DrawnOperation(Operation.SOLARIZE_ADD, (min(128, int(level * 110)),))


def _enhancement(operation: Operation) -> Callable[[float, float, int, int], DrawnOperation]:
    """Colour, contrast, brightness and sharpness: a factor, which at 1 leaves the clip as it is."""

    def make(level: float, sign: float, height: int, width: int) -> DrawnOperation:
        return DrawnOperation(operation, (max(0.1, 1 + sign * level * 0.9),))

    return make


OPERATION_FACTORIES: dict[str, Callable[[float, float, int, int], DrawnOperation]] = {
    "AutoContrast": lambda level, sign, height, width: DrawnOperation(Operation.AUTO_CONTRAST),
    "Equalize": lambda level, sign, height, width: DrawnOperation(Operation.EQUALIZE),
    "Invert": lambda level, sign, height, width: DrawnOperation(Operation.INVERT),
    "Rotate": _rotate,
    "PosterizeIncreasing": _posterize,
    "SolarizeIncreasing": _solarize,
    "SolarizeAdd": _solarize_add,
    "ColorIncreasing": _enhancement(Operation.COLOR),
    "ContrastIncreasing": _enhancement(Operation.CONTRAST),
    "BrightnessIncreasing": _enhancement(Operation.BRIGHTNESS),
    "SharpnessIncreasing": _enhancement(Operation.SHARPNESS),
    "ShearX": _shear_x,
    "ShearY": _shear_y,
    "TranslateXRel": _translate_x,
    "TranslateYRel": _translate_y,
}
"""The operations by timm's names: from (magnitude / 10, sign, height, width)."""
