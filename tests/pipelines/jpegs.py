"""Folders of JPEG frames for tests."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_frames(folder: Path, pictures: np.ndarray, pattern: str = "{:05d}.jpg", first: int = 1) -> Path:
    """Write pictures, (T, H, W, 3) RGB, as the frames of a folder; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, picture in enumerate(pictures, first):
        Image.fromarray(picture).save(folder / pattern.format(number), quality=90)
    return folder
