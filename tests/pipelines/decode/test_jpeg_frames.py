"""Folders of JPEG frames: their order, their pixels, and what makes one unusable."""

import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.decode.jpeg_frames import JpegFrames, decode_jpeg, frames_shape, list_frames
from pipelines.errors import VideoError
from tests.pipelines.jpegs import write_frames
from tests.pipelines.videos import moving_picture

COUNT, HEIGHT, WIDTH = 9, 60, 84


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_frames(tmp_path / "100218", moving_picture(COUNT, HEIGHT, WIDTH))


def test_the_frames_are_those_of_libjpeg_in_the_order_of_their_numbers(folder: Path) -> None:
    assert list_frames(folder) == [f"{number:05d}.jpg" for number in range(1, COUNT + 1)]
    assert frames_shape(folder) == (COUNT, HEIGHT, WIDTH)
    expected = np.stack([np.asarray(Image.open(folder / name)) for name in list_frames(folder)])
    indices = np.array([7, 0, 0, 8], np.int32)
    read = JpegFrames.read(folder, indices, COUNT)
    assert sorted(read.files) == [0, 7, 8]
    np.testing.assert_array_equal(read.decode(indices, size=(HEIGHT, WIDTH)), expected[indices])
    roi = read.decode(indices, (3, 10, 50, 61), size=(HEIGHT, WIDTH))
    np.testing.assert_array_equal(roi, expected[indices][:, 3:50, 10:61])


@pytest.mark.parametrize(
    ("pattern", "first"),
    [("{}.jpg", 1), ("img_{:05d}.jpg", 1), ("frame{:06d}.JPEG", 0), ("v1-{:03d}.jpg", 0)],
)
def test_names_may_have_a_prefix_and_any_number_of_digits(tmp_path: Path, pattern: str, first: int) -> None:
    write_frames(tmp_path, moving_picture(12, 16, 16), pattern, first)
    for ignored in (".00001.jpg", "._00001.jpg", "Thumbs.db", "readme.txt"):
        (tmp_path / ignored).write_bytes(b"x")
    assert list_frames(tmp_path) == [pattern.format(number) for number in range(first, first + 12)]


def remove(number: int) -> Callable[[Path], None]:
    return lambda folder: (folder / f"{number:05d}.jpg").unlink()


def add(name: str) -> Callable[[Path], None]:
    return lambda folder: shutil.copy(folder / "00002.jpg", folder / name) and None


def cut(folder: Path) -> None:
    path = folder / "00004.jpg"
    path.write_bytes(path.read_bytes()[:-2])  # the end marker only


def replace(content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / "00004.jpg").write_bytes(content) and None


def empty(folder: Path) -> None:
    (folder / "00004.jpg").write_bytes(b"")


def resize(folder: Path) -> None:
    Image.open(folder / "00004.jpg").resize((40, 30)).save(folder / "00004.jpg")


def to_png(folder: Path) -> None:
    Image.open(folder / "00004.jpg").save(folder / "00004.jpg", "PNG")


def no_frames(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DEFECTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing frame": (remove(5), "lacks frame 5: 00004.jpg is followed by 00006.jpg"),
    "missing beginning": (remove(1), "begins with 00002.jpg"),
    "number twice": (add("5.jpg"), "holds frame 5 twice: 00005.jpg and 5.jpg"),
    "two sequences": (add("flow_00001.jpg"), "frames of two names: flow_00001.jpg and 00001.jpg"),
    "name without a number": (add("cover.jpg"), "holds cover.jpg"),
    "truncated": (cut, "is damaged in frame 3 of 9 (00004.jpg): image file is truncated"),
    "no JPEG": (to_png, "is damaged in frame 3 of 9 (00004.jpg): it is no JPEG"),
    "text": (replace(b"<html>404</html>"), "(00004.jpg): it is no JPEG"),
    "empty": (empty, "has a frame 3 (00004.jpg) that is empty (0 bytes)"),
    "another size": (resize, "changes from frames of 84x60 to 40x30 at frame 3 (00004.jpg)"),
    "no frame": (no_frames, "holds no JPEG frame"),
    "no folder": (shutil.rmtree, "cannot be read: No such file or directory"),
}


@pytest.mark.parametrize(("damage", "reason"), DEFECTS.values(), ids=DEFECTS)
def test_an_unusable_folder_is_refused_with_its_reason(
    folder: Path, damage: Callable[[Path], None], reason: str
) -> None:
    damage(folder)
    with pytest.raises(VideoError, match=re.escape(reason)):
        frames_shape(folder)


def test_a_damaged_frame_matters_only_to_clips_that_contain_it(folder: Path) -> None:
    cut(folder)
    intact, damaged = np.array([2, 4, 5], np.int32), np.array([2, 3, 5], np.int32)
    JpegFrames.read(folder, intact, COUNT).decode(intact, size=(HEIGHT, WIDTH))
    with pytest.raises(VideoError, match="is damaged in frame 3 of 9"):
        JpegFrames.read(folder, damaged, COUNT).decode(damaged, size=(HEIGHT, WIDTH))


def test_a_folder_that_changed_after_the_manifest_was_made_is_refused(folder: Path) -> None:
    indices = np.arange(3, dtype=np.int32)
    with pytest.raises(VideoError, match="has 9 frames, but the manifest has 8"):
        JpegFrames.read(folder, indices, COUNT - 1)
    with pytest.raises(VideoError, match="has frames of 84x60, but the manifest has 60x84"):
        JpegFrames.read(folder, indices, COUNT).decode(indices, size=(WIDTH, HEIGHT))


def test_grey_and_cmyk_become_rgb_and_the_exif_orientation_is_applied() -> None:
    picture = Image.fromarray(moving_picture(1, 16, 24)[0])

    def encoded(picture: Image.Image, **options: object) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", **options)
        return buffer.getvalue()

    grey = decode_jpeg(encoded(picture.convert("L")))
    assert grey.shape == (16, 24, 3) and (grey == grey[..., :1]).all()
    assert decode_jpeg(encoded(picture.convert("CMYK"))).shape == (16, 24, 3)
    plain = encoded(picture)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be rotated by 90 degrees clockwise
    np.testing.assert_array_equal(decode_jpeg(encoded(picture, exif=exif)), np.rot90(decode_jpeg(plain), -1))
