"""RandAugment (Cubuk et al. 2019): parses policies and draws the operations of a clip with their arguments.

Pure NumPy. Policies, operations and magnitudes follow timm. The fifteen operations are timm's "increasing"
set, in which a larger magnitude always means a stronger change. `dali_nodes.py` applies them to all frames
of a clip alike.
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
UNIFORM_ABOVE = 100  # mstd above this: the magnitude is uniform between 0 and m
MAX_OPERATIONS = 16  # each is a branch of the graph


class Operation(IntEnum):
    """Codes of the operations in the graph; NOTHING fills unused positions.

    Rotation and both shears share WARP, with different matrices.
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
    SHARPNESS_AT_EDGE = 11  # where the needed region touches the edge of the frame
    WARP = 12
    TRANSLATE_X = 13
    TRANSLATE_Y = 14


class DrawnOperation(NamedTuple):
    """One operation on full frames."""

    operation: Operation
    """Its code."""
    arguments: tuple[float, ...] = ()
    """Posterize: a bit mask. Solarize: a level, 0 to 255. Solarize add: an amount. Colour, contrast,
    brightness, sharpness: a factor, 1 for no change. Warp: a 2 x 3 matrix, row-major, from target to source
    position in pixels from the corner of the frame. Translate: source minus target position in pixels."""


@dataclass(frozen=True)
class Policy:
    """A parsed policy string."""

    magnitude: float
    """Mean magnitude; 0 to 10 in common use."""
    count: int
    """Operations drawn per clip, with replacement."""
    magnitude_std: float
    """Standard deviation of each operation's magnitude; infinite for a uniform distribution."""
    probability: float
    """Probability that a drawn operation is applied."""
    magnitude_max: float = MAX_MAGNITUDE
    """Largest magnitude; larger ones are clipped."""


WHOLE = r"\d+"
DECIMAL = r"\d+(?:\.\d+)?"
PARTS = {"m": WHOLE, "n": WHOLE, "mstd": DECIMAL, "mmax": WHOLE, "inc": WHOLE, "p": DECIMAL}


@lru_cache(maxsize=8)
def parse_policy(text: str) -> Policy:
    """Parse a policy such as `rand-m7-n4-mstd0.5-inc1`, with timm's meaning and defaults.

    m: magnitude, 10 by default. n: operations, 2. mstd: standard deviation of the magnitude, 0; above 100:
    uniform from 0 to m. mmax: largest magnitude, 10. p: probability of each operation, 0.5. inc1 is
    required.

    Raises DataError that names the wrong part.
    """
    head, *parts = text.split("-")
    if head != "rand":
        raise DataError(f"rand_augment '{text}': must start with 'rand-', as in rand-m7-n4-mstd0.5-inc1")
    values = {"m": 10.0, "n": 2.0, "mstd": 0.0, "mmax": 0.0, "inc": 0.0, "p": 0.5}
    for part in parts:
        name, value = _split(text, part)
        values[name] = value
    if not values["inc"]:
        raise DataError(f"rand_augment '{text}': only the increasing operations are supported; add '-inc1'")
    if not 1 <= values["n"] <= MAX_OPERATIONS:
        raise DataError(f"rand_augment '{text}': n must lie in 1..{MAX_OPERATIONS}")
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
    """Name and value of one part of a policy; raises DataError."""
    match = re.fullmatch(r"([a-z]+)(.*)", part)
    name, value = match.groups() if match else (part, "")
    if name.startswith("t") or name == "w":
        raise DataError(
            f"rand_augment '{text}': part '{part}' chooses another set or weighting of operations, which is "
            "not supported; remove it to use the fifteen increasing operations with equal probability"
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
    """Draw the operations applied to a clip of `height` x `width` pixels, in order."""
    drawn = []
    factories = tuple(OPERATION_FACTORIES.values())
    for choice in rng.integers(0, len(factories), size=policy.count):
        is_applied = rng.random() < policy.probability
        level = draw_magnitude(policy, rng) / MAX_MAGNITUDE
        sign = 1.0 if rng.random() < 0.5 else -1.0
        if is_applied:
            drawn.append(factories[choice](level, sign, height, width))
    return [each for each in drawn if each.operation != Operation.NOTHING]


def draw_magnitude(policy: Policy, rng: np.random.Generator) -> float:
    """The magnitude of one operation, 0 to `policy.magnitude_max`."""
    if np.isinf(policy.magnitude_std):
        magnitude = rng.uniform(0, policy.magnitude)
    else:
        magnitude = rng.normal(policy.magnitude, policy.magnitude_std)
    return float(np.clip(magnitude, 0, policy.magnitude_max))


def _rotate(level: float, sign: float, height: int, width: int) -> DrawnOperation:
    """Up to 30 degrees about the middle of the frame; positive is counterclockwise."""
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
    """Keep the 4 to 0 highest bits; 0 bits give black."""
    bits = max(0, 4 - int(level * 4))
    return DrawnOperation(Operation.POSTERIZE, (~(2 ** (8 - bits) - 1) & 0xFF,))


def _solarize(level: float, sign: float, height: int, width: int) -> DrawnOperation:
    """Invert from a threshold on that falls from 256, which no pixel reaches, to 0."""
    threshold = 256 - min(256, int(level * 256))
    if threshold == 256:
        return DrawnOperation(Operation.NOTHING)
    return DrawnOperation(Operation.SOLARIZE, (threshold,))


def _solarize_add(level: float, sign: float, height: int, width: int) -> DrawnOperation:
    return DrawnOperation(Operation.SOLARIZE_ADD, (min(128, int(level * 110)),))


def _enhancement(operation: Operation) -> Callable[[float, float, int, int], DrawnOperation]:
    """Colour, contrast, brightness and sharpness by a factor; 1 leaves the clip unchanged."""

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
"""timm's name → function of (magnitude / 10, sign, height, width) that gives the operation."""
