"""Each operation at several magnitudes against timm's on the same frame: figures, table and pictures.

`python -m tests.pipelines.augmentation_parity` writes the table into docs/augmentation.md, between its marks,
and the pictures to docs/pictures/.
"""

import random
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP

from pipelines.augment.rand_augment import OPERATION_FACTORIES, DrawnOperation
from tests.pipelines.augmentation_graphs import CPU, on_full_frames, operated

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/augmentation.md"
MARKS = ("<!-- parity: begin -->", "<!-- parity: end -->")
MAGNITUDES = (0, 2, 5, 7, 9, 10)
PICTURED = 9  # the magnitude of the pictures
GREY = (128, 128, 128)
SEEDS = {1: 1, -1: 0}  # Python's generator, seeded so, lets timm keep or negate its next argument


@dataclass(frozen=True)
class Case:
    """An operation at one magnitude: the results of timm and of the graph on the same frame, uint8, H W 3."""

    name: str
    magnitude: float
    before: np.ndarray
    timm: np.ndarray
    graph: np.ndarray

    @property
    def difference(self) -> np.ndarray:
        """In levels, per value."""
        return np.abs(self.timm.astype(int) - self.graph.astype(int))


def frame(name: str) -> np.ndarray:
    """The frame an operation is tried on, H W 3."""
    pixels = np.asarray(Image.open(Path(__file__).parent / "data/frame.png").convert("RGB"))
    if name == "AutoContrast":  # the frame already has black and white, so nothing would change
        return (pixels * [0.5, 0.6, 0.7] + [60, 40, 20]).round().astype(np.uint8)
    return pixels


def by_timm(name: str, magnitude: float, sign: int, pixels: np.ndarray) -> np.ndarray:
    """timm's operation, with its default interpolation (bicubic) and the grey of the reference recipe."""
    random.seed(SEEDS[sign])
    levels = LEVEL_TO_ARG[name]
    arguments = levels(magnitude, {}) if levels else ()
    if name == "PosterizeIncreasing" and arguments[0] == 0:
        return np.zeros_like(pixels)  # no bit left: black in earlier versions of Pillow, which 13 refuses
    changed = NAME_TO_OP[name](
        Image.fromarray(pixels), *arguments, fillcolor=GREY, resample=Image.Resampling.BICUBIC
    )
    return np.asarray(changed)


def by_graph(
    drawn: list[DrawnOperation], frames: list[np.ndarray], device: torch.device = CPU
) -> list[np.ndarray]:
    """The graph's result for each operation on each frame, all in one batch."""
    laid_out = [
        on_full_frames([each], *pixels.shape[:2], 1) for each, pixels in zip(drawn, frames, strict=True)
    ]
    return [clip[0] for clip in operated([pixels[None] for pixels in frames], laid_out, device)]


def compare(device: torch.device = CPU) -> list[Case]:
    """All operations at all magnitudes, each with the sign that a magnitude's parity gives it."""
    tried = [
        (name, magnitude, 1 - 2 * (place % 2))
        for name in OPERATION_FACTORIES
        for place, magnitude in enumerate(MAGNITUDES)
    ]
    frames = [frame(name) for name, _, _ in tried]
    drawn = [
        OPERATION_FACTORIES[name](magnitude / 10, sign, *pixels.shape[:2])
        for (name, magnitude, sign), pixels in zip(tried, frames, strict=True)
    ]
    return [
        Case(name, magnitude, pixels, by_timm(name, magnitude, sign, pixels), graph)
        for (name, magnitude, sign), pixels, graph in zip(
            tried, frames, by_graph(drawn, frames, device), strict=True
        )
    ]


def table(cases: list[Case]) -> str:
    """Mean and greatest difference in levels of 255, operations down, magnitudes across."""
    head = ["operation", *(f"m {magnitude}" for magnitude in MAGNITUDES), "more than 2 levels off"]
    lines = [" | ".join(head), "|".join(["---"] * len(head))]
    for name in OPERATION_FACTORIES:
        own = [case for case in cases if case.name == name]
        off = np.mean([(case.difference > 2).mean() for case in own])
        cells = [f"{case.difference.mean():.2f} ({case.difference.max()})" for case in own]
        lines.append(" | ".join([name, *cells, f"{100 * off:.1f} %"]))
    return "\n".join(f"| {line} |" for line in lines)


def pictures(cases: list[Case], names: list[str], path: Path) -> None:
    """A row for each operation: the frame, timm's result, the graph's, and eight times their difference."""
    height, width = frame(names[0]).shape[:2]
    height, width = height * 5 // 8, width * 5 // 8
    label = 14
    sheet = Image.new("RGB", (4 * width, len(names) * (height + label)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, name in enumerate(names):
        case = next(case for case in cases if (case.name, case.magnitude) == (name, PICTURED))
        amplified = np.minimum(8 * case.difference, 255).astype(np.uint8)
        titles = (f"{name}, magnitude {PICTURED}: before", "timm", "graph", "difference x 8")
        for column, (pixels, title) in enumerate(
            zip((case.before, case.timm, case.graph, amplified), titles, strict=True)
        ):
            corner = (column * width, row * (height + label))
            pen.text((corner[0] + 2, corner[1] + 1), title, fill="black")
            sheet.paste(Image.fromarray(pixels).resize((width, height)), (corner[0], corner[1] + label))
    sheet.quantize(256).save(path, optimize=True)  # a palette: a third of the size


def main() -> None:
    cases = compare()
    versions = ", ".join(
        f"{name} {version(package)}"
        for name, package in (("DALI", "nvidia-dali-cuda120"), ("timm", "timm"), ("Pillow", "pillow"))
    )
    before, rest = PAGE.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    PAGE.write_text(
        f"{before}{MARKS[0]}\n{versions}, CPU.\n\n{table(cases)}\n{MARKS[1]}{after}", encoding="utf-8"
    )
    names = list(OPERATION_FACTORIES)
    for number in range(3):
        pictures(
            cases, names[5 * number : 5 * number + 5], ROOT / f"docs/pictures/augmentation_{number + 1}.png"
        )


if __name__ == "__main__":
    main()
