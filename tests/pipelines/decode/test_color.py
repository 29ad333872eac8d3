"""Patches of known colour, coded by formula and not by a library, come back right from both decoders."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from pipelines.decode.color import UNSUPPORTED_MATRICES, check_colorspace, color_correction
from pipelines.decode.pyav import decode_frames
from pipelines.errors import VideoError
from tests.pipelines.decode.test_decode import decode_by_dali

PATCHES = np.array(
    [
        *[(200, 60, 70), (60, 170, 80), (70, 80, 180), (128, 128, 128)],
        *[(210, 200, 90), (30, 30, 30), (225, 225, 225), (150, 90, 170)],
    ]
)
SIDE = 32  # pixels of a patch
LEVELS = 3  # of 255 that a patch may be off: rounding to 8 bits, twice, and the codec
SHARES = {1: (0.2126, 0.0722), 2: (0.299, 0.114), 5: (0.299, 0.114), 6: (0.299, 0.114), 9: (0.2627, 0.0593)}
MATRICES = {"untagged": 2, "bt601": 6, "bt709": 1, "bt2020": 9}
UNSPECIFIED, LIMITED, FULL = 0, 1, 2  # FFmpeg's numbers of ranges


def coded(colorspace: int, full: bool) -> np.ndarray:
    """PATCHES as Y, Cb, Cr levels, (8, 3), by the definition in ITU-R BT.601, 709 and 2020."""
    share_red, share_blue = SHARES[colorspace]
    red, green, blue = PATCHES.T / 255
    luma = share_red * red + (1 - share_red - share_blue) * green + share_blue * blue
    difference_blue, difference_red = (blue - luma) / 2 / (1 - share_blue), (red - luma) / 2 / (1 - share_red)
    if full:
        levels = 255 * luma, 128 + 255 * difference_blue, 128 + 255 * difference_red
    else:
        levels = 16 + 219 * luma, 128 + 224 * difference_blue, 128 + 224 * difference_red
    return np.stack(levels, axis=1).round().astype(np.uint8)


def encode_patches(
    path: Path, codec: str, options: dict[str, str], *, pixels: str, colorspace: int, color_range: int
) -> Path:
    levels = coded(colorspace, color_range == FULL)
    subsampled = 1 if "444" in pixels else 2
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height, stream.pix_fmt = 4 * SIDE, 2 * SIDE, pixels
        stream.codec_context.colorspace = colorspace
        stream.codec_context.color_range = color_range
        frame = av.VideoFrame(4 * SIDE, 2 * SIDE, pixels)
        for channel, plane in enumerate(frame.planes):
            side = SIDE if channel == 0 else SIDE // subsampled
            values = np.kron(levels[:, channel].reshape(2, 4), np.ones((side, side))).astype(np.uint8)
            padded = np.zeros((plane.height, plane.line_size), np.uint8)
            padded[:, : plane.width] = values
            plane.update(padded.tobytes())
        frame.colorspace, frame.color_range = colorspace, color_range
        for index in range(3):
            frame.pts, frame.time_base = index, Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def measured(frame: np.ndarray) -> np.ndarray:
    """The mean colour in the middle of each patch, (8, 3)."""
    patches = frame.reshape(2, SIDE, 4, SIDE, 3).transpose(0, 2, 1, 3, 4).reshape(8, SIDE, SIDE, 3)
    return patches[:, 8:24, 8:24].mean(axis=(1, 2))


X264, VPX = {"crf": "4"}, {"crf": "4", "b": "0", "cpu-used": "8"}


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("matrix", MATRICES)
@pytest.mark.parametrize(
    ("codec", "extension", "options", "pixels"),
    [
        ("libx264", "mp4", X264, "yuv420p"),
        ("libx264", "mp4", X264, "yuv444p"),
        ("libvpx-vp9", "webm", VPX, "yuv420p"),
        ("libvpx-vp9", "webm", VPX, "yuv444p"),
    ],
)
def test_colours_come_back(
    tmp_path: Path,
    codec: str,
    extension: str,
    options: dict[str, str],
    pixels: str,
    matrix: str,
    full: bool,
    device: torch.device,
) -> None:
    path = tmp_path / f"patches.{extension}"
    color_range = FULL if full else UNSPECIFIED if matrix == "untagged" else LIMITED
    encode_patches(path, codec, options, pixels=pixels, colorspace=MATRICES[matrix], color_range=color_range)
    decoded = decode_frames(path, np.array([1]))[0]
    np.testing.assert_allclose(measured(decoded), PATCHES, atol=LEVELS)
    in_graph = codec == "libvpx-vp9" if device.type == "cpu" else (codec, pixels) == ("libx264", "yuv420p")
    if in_graph:
        np.testing.assert_allclose(measured(decode_by_dali([path], [1], device)[0][0]), PATCHES, atol=LEVELS)


def test_motion_jpeg_is_full_range(tmp_path: Path) -> None:
    path = tmp_path / "patches.avi"
    options = {"qmin": "2", "qmax": "2"}
    encode_patches(path, "mjpeg", options, pixels="yuvj420p", colorspace=5, color_range=FULL)
    np.testing.assert_allclose(measured(decode_frames(path, np.array([1]))[0]), PATCHES, atol=LEVELS)
    cpu = torch.device("cpu")  # NVDEC is not given Motion JPEG
    np.testing.assert_allclose(measured(decode_by_dali([path], [1], cpu)[0][0]), PATCHES, atol=LEVELS)


def test_a_batch_may_mix_matrices(tmp_path: Path, device: torch.device) -> None:
    codec, options = ("libx264", X264) if device.type == "cuda" else ("libvpx-vp9", VPX)
    paths = [
        encode_patches(
            tmp_path / f"{name}.mkv",
            codec,
            options,
            pixels="yuv420p",
            colorspace=MATRICES[name],
            color_range=LIMITED,
        )
        for name in ("bt601", "bt709", "bt2020")
    ]
    for decoded in decode_by_dali(paths, [1], device):
        np.testing.assert_allclose(measured(decoded[0]), PATCHES, atol=LEVELS)


@pytest.mark.parametrize("colorspace", [0, 2, 3, 5, 6, 8, 10, 14])
def test_bt601_and_unknown_matrices_are_unchanged(colorspace: int) -> None:
    np.testing.assert_array_equal(color_correction(colorspace), np.eye(3, 4))


@pytest.mark.parametrize("colorspace", [1, 4, 7, 9])
def test_greys_stay_grey_under_every_matrix(colorspace: int) -> None:
    matrix = color_correction(colorspace)
    np.testing.assert_allclose(matrix[:, :3].sum(axis=1), 1, atol=1e-6)
    assert not matrix[:, 3].any() and np.abs(matrix[:, :3] - np.eye(3)).max() > 0.001


@pytest.mark.parametrize(("colorspace", "name"), UNSUPPORTED_MATRICES.items())
def test_matrices_unsupported_by_ffmpeg_are_refused_by_name(colorspace: int, name: str) -> None:
    with pytest.raises(VideoError, match=name):
        check_colorspace(colorspace)
