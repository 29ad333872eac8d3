"""Draws the clips of the embedded data set: textured shapes over drifting patterns, anti-aliased.

Lengths are fractions of the frame's shorter side; the origin is the frame's centre, x points right, y down.
Colours are RGB in [0, 1]. Arrays are 3 T H W, as NumPy is slow over short last axes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

_LUMA = np.array([0.299, 0.587, 0.114])

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Signed distance to a shape's edge, negative inside; the shape fills the unit disc."""


@dataclass(frozen=True, slots=True)
class ShapePath:
    """The path of a shape over T frames; every field is a float array (T,)."""

    x: np.ndarray
    """Centre, to the right."""
    y: np.ndarray
    """Centre, downwards."""
    radius: np.ndarray
    """Radius of the disc around the shape."""
    angle: np.ndarray
    """Radians; increasing angles rotate clockwise on the screen."""


def draw_clip(rng: np.random.Generator, path: ShapePath, height: int, width: int) -> np.ndarray:
    """Draw a shape along `path` over an independently drifting background.

    Returns:
        T H W 3, uint8.
    """
    # Shape and background differ in brightness by at least 0.3; either may be the brighter one.
    dark, bright = rng.uniform(0.12, 0.32), rng.uniform(0.68, 0.88)
    behind, ahead = (dark, bright) if rng.random() < 0.5 else (bright, dark)
    x, y = _pixel_centres(height, width)
    scene = _background(rng, x, y, len(path.x), behind)
    coverage, paint = _shape(rng, path, x, y, min(height, width), ahead)
    paint -= scene
    paint *= coverage
    scene += paint
    scene *= 255
    return np.ascontiguousarray(np.moveaxis(np.rint(scene, out=scene).astype(np.uint8), 0, -1))


def _pixel_centres(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    short = min(height, width)
    x = (np.arange(width) + 0.5 - width / 2) / short
    y = (np.arange(height) + 0.5 - height / 2) / short
    return x.astype(np.float32)[None, :], y.astype(np.float32)[:, None]


def _colour(rng: np.random.Generator, luma: float) -> np.ndarray:
    """A random colour of about the given luma, clipped to [0, 1]."""
    chroma = rng.normal(size=3)
    chroma -= chroma @ _LUMA
    chroma *= rng.uniform(0.1, 0.35) / np.abs(chroma).max()
    return (luma + chroma).clip(0, 1).astype(np.float32)


def _background(
    rng: np.random.Generator, x: np.ndarray, y: np.ndarray, frames: int, luma: float
) -> np.ndarray:
    """Two colours of similar brightness, blended by a few plane waves that drift: 3 T H W, float32."""
    pattern = rng.choice(["clouds", "water", "stripes", "checks"])
    time = np.linspace(-0.5, 0.5, frames, dtype=np.float32)[:, None, None]
    direction = rng.uniform(0, 2 * np.pi)
    drift = rng.uniform(0, 0.35) * np.array([np.cos(direction), np.sin(direction)])

    def wave(angle: float, cycles: float, own_phase: float = 0.0) -> np.ndarray:
        """T H W; `own_phase` radians over the clip are added to the common drift."""
        kx, ky = 2 * np.pi * cycles * np.array([np.cos(angle), np.sin(angle)])
        phase = rng.uniform(0, 2 * np.pi)
        moving = (own_phase - kx * drift[0] - ky * drift[1]) * time + phase
        return np.cos((kx * x + ky * y)[None] + moving, dtype=np.float32)

    angle = rng.uniform(0, np.pi)
    if pattern == "clouds":
        tone = sum(wave(rng.uniform(0, np.pi), rng.uniform(0.7, 4)) for _ in range(6)) / 2.5
    elif pattern == "water":
        tone = sum(wave(rng.uniform(0, np.pi), rng.uniform(2, 6), rng.uniform(-4, 4)) for _ in range(6)) / 2.5
    elif pattern == "stripes":
        tone = wave(angle, rng.uniform(2, 6)) + 0.4 * wave(rng.uniform(0, np.pi), 1.0)
    else:
        cycles = rng.uniform(1.5, 4)
        tone = wave(angle, cycles) * wave(angle + np.pi / 2, cycles)
    blend = (0.5 + 0.5 * np.asarray(tone, np.float32)).clip(0, 1)
    return _blended(_colour(rng, luma - 0.06), _colour(rng, luma + 0.06), blend)


def _blended(first: np.ndarray, second: np.ndarray, amount: np.ndarray) -> np.ndarray:
    """From the first colour, where `amount` (T H W) is 0, to the second, where it is 1: 3 T H W."""
    picture = amount * (second - first)[:, None, None, None]
    picture += first[:, None, None, None]
    return picture


def _shape(
    rng: np.random.Generator, path: ShapePath, x: np.ndarray, y: np.ndarray, short: int, luma: float
) -> tuple[np.ndarray, np.ndarray]:
    """Coverage T H W in [0, 1] and paint 3 T H W of one random shape."""
    distance = SHAPES[str(rng.choice(sorted(SHAPES)))]
    centre_x, centre_y, radius, angle = (
        a.astype(np.float32)[:, None, None] for a in (path.x, path.y, path.radius, path.angle)
    )
    dx, dy = (x - centre_x) / radius, (y - centre_y) / radius
    cos, sin = np.cos(angle), np.sin(angle)
    u, v = cos * dx + sin * dy, cos * dy - sin * dx
    # One pixel wide from fully inside to fully outside: motion below a pixel still changes the picture.
    coverage = (0.5 - distance(u, v) * (radius * short)).clip(0, 1)
    first, second = _colour(rng, luma), _colour(rng, luma + rng.uniform(-0.12, 0.12))
    return coverage, _blended(first, second, _texture(rng, u, v))


def _texture(rng: np.random.Generator, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """How much of the second colour is where, in [0, 1]; it is fixed to the shape and moves with it."""
    kind = rng.choice(["plain", "gradient", "stripes", "spots", "rings"])
    frequency, phase = rng.uniform(4, 9), rng.uniform(0, 2 * np.pi)
    if kind == "plain":
        return np.zeros_like(u)
    if kind == "gradient":
        return (0.5 + 0.5 * u).clip(0, 1)
    if kind == "stripes":
        return 0.5 + 0.5 * np.cos(frequency * v + phase)
    if kind == "spots":
        return 0.5 + 0.5 * np.cos(frequency * u + phase) * np.cos(frequency * v)
    return 0.5 + 0.5 * np.cos(frequency * np.sqrt(u * u + v * v) + phase)


def _disc(u: np.ndarray, v: np.ndarray, x: float, y: float, radius: float) -> np.ndarray:
    return np.sqrt((u - x) ** 2 + (v - y) ** 2) - radius


def _box(u: np.ndarray, v: np.ndarray, left: float, right: float, top: float, bottom: float) -> np.ndarray:
    return np.maximum(
        np.abs(u - (left + right) / 2) - (right - left) / 2,
        np.abs(v - (top + bottom) / 2) - (bottom - top) / 2,
    )


def _triangle(u: np.ndarray, v: np.ndarray, base: float, half_width: float, tip: float) -> np.ndarray:
    """Isosceles, pointing along u: its base at u = `base`, its tip at u = `tip`."""
    length = tip - base
    flank = np.hypot(length, half_width)
    return np.maximum(base - u, (np.abs(v) * length - (tip - u) * half_width) / flank)


def _arrow(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.minimum(_box(u, v, -0.97, 0.1, -0.24, 0.24), _triangle(u, v, 0.0, 0.75, 1.0))


def _mouth(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    opening = np.abs(v) * np.cos(0.7) - u * np.sin(0.7)
    return np.maximum(_disc(u, v, 0, 0, 1), -opening)


def _crescent(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(_disc(u, v, 0, 0, 1), -_disc(u, v, 0.55, 0, 0.75))


def _drop(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.minimum(_disc(u, v, -0.4, 0, 0.6), _triangle(u, v, -0.12, 0.53, 1.0))


def _corner(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.minimum(_box(u, v, -0.7, -0.2, -0.7, 0.7), _box(u, v, -0.7, 0.7, 0.2, 0.7))


def _hammer(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.minimum(_box(u, v, -0.97, 0.5, -0.2, 0.2), _box(u, v, 0.2, 0.75, -0.65, 0.65))


def _key(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    ring = np.maximum(_disc(u, v, -0.5, 0, 0.5), -_disc(u, v, -0.5, 0, 0.2))
    shaft = _box(u, v, -0.1, 0.97, -0.15, 0.15)
    return np.minimum(np.minimum(ring, shaft), _box(u, v, 0.58, 0.88, -0.1, 0.45))


def _half_disc(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(_disc(u, v, 0, 0, 1), -0.1 - u)


# None has a rotational symmetry, so every angle gives a different picture.
SHAPES: dict[str, Distance] = {
    "arrow": _arrow,
    "corner": _corner,
    "crescent": _crescent,
    "drop": _drop,
    "half_disc": _half_disc,
    "hammer": _hammer,
    "key": _key,
    "mouth": _mouth,
}
