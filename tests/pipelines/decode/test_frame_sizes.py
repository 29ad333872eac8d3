"""Videos whose headers change the frame size, with which DALI's CPU decoder reads invalid memory."""

import io
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.augment.params import TrainClipSpec
from pipelines.dali.encoded_input import GraphDecoder, UnsupportedByGraph, check_encoded
from pipelines.dataset.manifest import ManifestRow, write_manifest
from pipelines.decode.frame_sizes import CODECS, has_one_size
from pipelines.worker_pool import IsolatedProcess
from tests.pipelines.batches import loader, options
from tests.pipelines.videos import KINDS, Kind, make_video, moving_picture

HEIGHT, WIDTH, FRAMES = 80, 112, 12
MJPEG = Kind("mjpeg", "avi", pixels="yuvj420p", frames=FRAMES)


def packets(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


def row(path: Path, codec: str) -> ManifestRow:
    return ManifestRow(path.name, 0, 0, 0, FRAMES, 25.0, WIDTH, HEIGHT, codec)


def change_header(path: Path, frame: int, *, width: int) -> None:
    """Change the width in the header of a JPEG frame."""
    content = bytearray(path.read_bytes())
    at = -1
    for _ in range(frame + 1):
        at = content.index(b"\xff\xc0\x00\x11\x08", at + 1)
    content[at + 7 : at + 9] = width.to_bytes(2, "big")
    path.write_bytes(content)


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if name.split()[0] in CODECS])
def test_valid_videos_have_one_size(tmp_path: Path, name: str) -> None:
    assert has_one_size(name.split()[0], packets(make_video(tmp_path, KINDS[name])))


@pytest.mark.parametrize("name", ["mjpeg", "vp8", "vp9"])
def test_another_size_is_found_in_the_headers(tmp_path: Path, name: str) -> None:
    """Two concatenated videos; VP9 also changes its size within a stream when an encoder resizes."""
    codec, pixels = KINDS[name].codec, KINDS[name].pixels
    kinds = [Kind(codec, "mkv", pixels=pixels, frames=6, size=size) for size in ((80, 112), (80, 96))]
    parts = []
    for number, kind in enumerate(kinds):
        (tmp_path / str(number)).mkdir()
        parts.append(packets(make_video(tmp_path / str(number), kind)))
    assert has_one_size(name, parts[0]) and has_one_size(name, parts[0] * 2) and has_one_size(name, parts[1])
    assert not has_one_size(name, parts[0] + parts[1])
    assert not has_one_size(name, parts[1] + parts[0])


def test_vp9_that_resizes_between_keyframes(tmp_path: Path) -> None:
    small = packets(make_video(tmp_path, Kind("libvpx-vp9", "webm", frames=3)))
    inter = small[1]
    # frame_marker 2, profile 0, not shown again, an inter frame that is shown; all references of other sizes.
    bits = "10" + "00" + "0" + "1" + "1" + "0" + "00" + "00000001" + "0000" * 3 + "000"
    header = int((bits + f"{WIDTH // 2 - 1:016b}" + f"{HEIGHT - 1:016b}").ljust(80, "0"), 2).to_bytes(
        10, "big"
    )
    assert has_one_size("vp9", [small[0], inter])
    assert not has_one_size("vp9", [small[0], header + inter[10:]])
    superframe = (
        inter + header + bytes([0xC9]) + len(inter).to_bytes(2, "little") + b"\x0a\x00" + bytes([0xC9])
    )
    assert not has_one_size("vp9", [small[0], superframe])


def jpeg(
    quality: int = 75,
    width: int = WIDTH,
    *,
    before: bytes = b"",
    progressive: bool = False,
    thumbnail: int = 0,
) -> bytes:
    """A picture. before: segments behind its first marker. thumbnail: width of one in its Exif data."""
    picture = Image.fromarray(moving_picture(1, HEIGHT, width)[0])
    content = io.BytesIO()
    exif = b""
    if thumbnail:
        tiff = b"MM\0*" + (8).to_bytes(4, "big") + bytes(2 + 4) + jpeg(width=thumbnail)
        exif = b"Exif\0\0" + tiff
    picture.save(content, "jpeg", quality=quality, progressive=progressive, exif=exif)
    return content.getvalue()[:2] + before + content.getvalue()[2:]


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("quality", [7, 9, 15, 16, 17, 20, 21, 75, 95])
def test_tables_of_a_jpeg_with_header_bytes_are_not_headers(quality: int, progressive: bool) -> None:
    picture, narrow = (jpeg(quality, width, progressive=progressive) for width in (WIDTH, WIDTH - 16))
    assert has_one_size("mjpeg", [picture, picture])
    assert not has_one_size("mjpeg", [picture, narrow])
    assert not has_one_size("mjpeg", [picture, picture + narrow])  # as fields are stored


def test_metadata_of_a_jpeg_are_skipped() -> None:
    random = np.random.default_rng(0).bytes(60_000)
    comment = b"\xff\xfe" + (2 + len(random)).to_bytes(2, "big") + random
    assert b"\xff\xc0" in comment[4:]
    pictures = [jpeg(), jpeg(before=comment), jpeg(thumbnail=32), jpeg(thumbnail=48)]
    assert has_one_size("mjpeg", pictures)
    assert not has_one_size("mjpeg", [*pictures, jpeg(width=WIDTH - 16, before=comment)])


@pytest.mark.parametrize(
    ("sound", "damaged"),
    [
        (b"\xff\xdb\0\x43\0", b"\xff\xdb\0\x43\x20"),  # a table of quantisation of unknown width
        (b"\xff\xdb\0\x43\0", b"\xff\xdb\x40\x43\0"),  # one that seems to hold the header
        (b"\xff\xc4\0\x1f\0", b"\xff\xc4\x01\x1f\0"),
        (b"\xff\xe0\0\x10JFIF", b"\xff\xe0\xff\xffJFIF"),  # longer than the packet
        (b"\xff\xe0\0\x10JFIF", b"\xff\xe0\0\0JFIF"),
        (b"\xff\xe0\0\x10JFIF\0", b"\xff\xe1\x02\x2eExif\0"),  # seems to hold it; its directory does not
    ],
)
def test_every_header_counts_after_a_damaged_segment_of_a_jpeg(sound: bytes, damaged: bytes) -> None:
    whole, narrow = jpeg(), jpeg(width=WIDTH - 16)
    assert narrow.count(sound) >= 1 and whole.find(b"\xff\xc0") < 0x22E
    assert not has_one_size("mjpeg", [whole, narrow.replace(sound, damaged, 1)])


def test_a_header_within_scan_data_counts() -> None:
    whole, narrow = jpeg(), jpeg(width=WIDTH - 16)
    at, header = narrow.index(b"\xff\xc0"), whole.index(b"\xff\xda") + 40
    assert not has_one_size("mjpeg", [whole[:header] + narrow[at : at + 19] + whole[header:]])


def test_unreadable_headers_are_skipped() -> None:
    for codec in CODECS:
        assert has_one_size(codec, [b"\xff", b"\0", b"\xff\xc0", bytes(40), b"\xff" * 40])


def test_a_file_with_another_size_in_its_header_is_left_to_pyav(tmp_path: Path) -> None:
    """DALI allocates frames of the size in the file's header."""
    path = make_video(tmp_path, Kind("libvpx-vp9", "webm", frames=FRAMES))
    indices = np.arange(FRAMES)
    check_encoded(path.read_bytes(), row(path, "vp9"), indices, GraphDecoder.CPU)
    width = b"\xb0\x81" + bytes([WIDTH])  # PixelWidth of a track
    assert path.read_bytes().count(width) == 1
    wrong = path.read_bytes().replace(width, b"\xb0\x81" + bytes([WIDTH - 8]))
    with pytest.raises(UnsupportedByGraph, match="another size than its header says"):
        check_encoded(wrong, row(path, "vp9"), indices, GraphDecoder.CPU)


def batches(manifest: Path, decoder: str) -> tuple[list[int], list[int], list[str]]:
    """The samples of an epoch, those that were bad, and why."""
    clips = loader(manifest, TrainClipSpec(4, 32), batch=4, how=options(decoder))
    seen = [batch for _, batch in zip(range(2), clips, strict=False)]
    ids, valid = torch.cat([b.ids for b in seen]), torch.cat([b.valid for b in seen])
    reasons = [defect.reason for defect in clips.bad_samples.pop_new()]
    clips.close()
    return sorted(ids.tolist()), ids[~valid].tolist(), reasons


def test_damaged_mjpeg_does_not_end_the_rank(tmp_path: Path) -> None:
    """It ended the process with SIGSEGV, so the loader runs in its own process here."""
    rows = []
    for number in range(8):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = make_video(folder, MJPEG, np.roll(moving_picture(FRAMES, HEIGHT, WIDTH), number, axis=2))
        rows.append(
            ManifestRow(f"{number}/{path.name}", 0, 0, number % 2, FRAMES, 25.0, WIDTH, HEIGHT, "mjpeg")
        )
    change_header(tmp_path / "3" / "clip.avi", frame=5, width=456)
    manifest = write_manifest(tmp_path / "train.arrow", rows, ["a", "b"]).path
    with IsolatedProcess() as isolation:
        ids, bad, reasons = isolation.call(batches, manifest, "dali")
        assert (ids, bad) == (list(range(8)), [3])
        assert len(reasons) == 1 and reasons[0].startswith("may change the size of its frames")
        ids, bad, _ = isolation.call(batches, manifest, "hybrid")
        assert ids == list(range(8)) and bad in ([], [3])  # PyAV decodes the frames that are drawn, no others
