"""The one interface by which the frames of a row are read, probed and identified, whatever its source is.

`open_source` chooses the class by the row's `SourceKind`. A further kind is a class with the methods of
`VideoSource` and an entry in `_CLASSES`. Frame numbers of a caller count the frames of the row: those of a
segment begin at 0 with its first frame.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from pipelines.dataset.content_key import combined_key, content_key, range_key
from pipelines.dataset.manifest_rows import ManifestRow, SourceKind
from pipelines.dataset.probe import VideoInfo, probe_frames, probe_video
from pipelines.decode.demux import open_video
from pipelines.decode.frame_stream import DEFAULT_RATE, FolderStream, FrameStream
from pipelines.decode.jpeg_frames import JpegFrames, list_frames
from pipelines.decode.packet_index import PacketIndex, checksum
from pipelines.decode.pyav import Roi, check_indexed_size, decode_frames, wanted_ranges
from pipelines.decode.video_file import FileRange, RangedContent, VideoContent, load_ranges, read_content
from pipelines.errors import VideoError
from pipelines.storage.object_store import StoreUnavailable, is_url
from pipelines.storage.remote_range import DIRECT, RemoteRange, StorageOptions


class ReadFrames(Protocol):
    """The requested frames as read from disk, not yet decoded."""

    @property
    def encoded(self) -> VideoContent | None:
        """The video file that holds them: its bytes, or where they are if it is long; None where there is
        none, as of JPEG frames. What decodes it in the graph is chosen by this."""

    @property
    def indices(self) -> NDArray[np.int32]:
        """Their numbers in the whole video."""

    def decode(
        self, roi: Roi | None, size: tuple[int, int], max_short_side: int | None = None
    ) -> NDArray[np.uint8]:
        """The frames in the requested order as RGB, (T, H, W, 3); raises VideoError.

        roi: (top, left, bottom, right) of the pixels to return, after scaling. size: (height, width) that the
        frames must have. max_short_side: to which they are scaled down (`scaled_size`); None does not scale.
        """


class VideoSource(Protocol):
    """Where a row's frames are. Where they cannot be used, every method but `content_key` raises
    VideoError."""

    def read(self, indices: NDArray[np.int32], *, in_graph: bool = False) -> ReadFrames:
        """Read what the frames at `indices`, numbers in the row, need.

        in_graph: whether the graph decodes them, which needs the whole file.

        Raises StoreUnavailable, as the other methods do, if the row is in an object store that is away.
        """

    def probe(self, *, deep: bool = False) -> VideoInfo:
        """Probe the whole video. deep: decode every frame."""

    def check_opens(self) -> None:
        """Open it and read its header, without decoding."""

    def stream(self) -> FrameStream | FolderStream:
        """The whole video, to decode all of its frames in order."""

    def encoded_bytes(self) -> int | None:
        """Size of the video file that `read` returns as `encoded`; None where it returns none."""

    def content_key(self) -> int:
        """A 64-bit hash of parts of the whole video's content, 0 if it cannot be read; see `content_key`."""


def open_source(
    path: Path,
    row: ManifestRow,
    packets: PacketIndex | None = None,
    storage: StorageOptions = DIRECT,
) -> VideoSource:
    """The source of a row; opens nothing yet.

    Args:
        path: the absolute path of the row. A row whose own path is a URL is read from there.
        packets: the packet index of its video, if there is one.
        storage: how a row in an object store is read.
    """
    return _CLASSES[SourceKind(row.source)](path, row, packets, storage)


def format_change(info: VideoInfo, row: ManifestRow) -> str:
    """How a video, as it was probed now, differs from its row, to follow its name in a sentence; empty if it
    does not."""
    frames = row.video_frames or row.frames
    now, then = (
        f"{count} frames of {video.width}x{video.height} in {video.codec}"
        for count, video in ((info.frames, info), (frames, row))
    )
    return "" if now == then else f"has {now}, but {then} in the manifest: the file was changed"


def row_content(
    path: Path, row: ManifestRow, packets: PacketIndex | None = None, storage: StorageOptions = DIRECT
) -> FileRange | RemoteRange:
    """The bytes of a row's video file; as `open_source`. Raises VideoError for a folder of frames."""
    if row.source == SourceKind.FRAMES:
        raise VideoError("is a folder of frames, not a video file")
    if not is_url(row.path):
        return FileRange(path, row.offset, row.length)
    version = "" if packets is None else f"{packets.crc:08x}"
    return RemoteRange(row.path, row.offset, row.length, storage, version)


_AT_ONCE = StorageOptions(patience=0.0)
"""Reads objects without a cache, and does not wait for a store that is away."""


@dataclass(frozen=True)
class EncodedFrames:
    """Frames of a video file."""

    encoded: VideoContent
    indices: NDArray[np.int32]
    packets: PacketIndex | None = None
    uncached: FileRange | RemoteRange | None = None
    """The video of the packet index, as it is on its disk or in its store now."""

    def decode(
        self, roi: Roi | None, size: tuple[int, int], max_short_side: int | None = None
    ) -> NDArray[np.uint8]:
        try:
            return decode_frames(
                self.encoded,
                self.indices,
                roi,
                size=size,
                max_short_side=max_short_side,
                packets=self.packets,
            )
        except VideoError as error:
            if self.packets is not None and self.uncached is not None:
                _check_unchanged(self.uncached, self.packets, error)
            raise


_checksum = lru_cache(1024)(checksum)


def _check_unchanged(content: FileRange | RemoteRange, packets: PacketIndex, error: VideoError) -> None:
    """Raises VideoError if a video was changed after its packet index was made, which explains `error`.

    Reads the video as a whole, once in a process, so only where decoding by the index failed.
    """
    try:
        found = _checksum(content)
    except (VideoError, StoreUnavailable, OSError):
        return
    if found != (packets.size, packets.crc):
        raise VideoError(
            "was changed after its packet index was made, to other content of the same size: run "
            "`uniformerv2 prepare index` for the manifest again, or make a new manifest if its frames differ"
        ) from error


@dataclass(frozen=True)
class FileSource:
    """A video file, or a range of bytes of a file, here or in an object store."""

    path: Path
    row: ManifestRow
    packets: PacketIndex | None
    storage: StorageOptions

    def read(self, indices: NDArray[np.int32], *, in_graph: bool = False) -> EncodedFrames:
        inside = indices + np.int32(self.row.first_frame)
        if self.packets is None or in_graph:
            return EncodedFrames(self._content(), inside)
        content = self._ranges()
        check_indexed_size(content.size, self.packets)
        loaded = load_ranges(content, wanted_ranges(self.packets, inside))
        uncached = row_content(self.path, self.row, storage=_AT_ONCE)
        return EncodedFrames(loaded, inside, self.packets, uncached)

    def probe(self, *, deep: bool = False) -> VideoInfo:
        return probe_video(self._content() if self._is_part else self.path, deep=deep)

    def check_opens(self) -> None:
        with open_video(self._ranges()):
            pass

    def stream(self) -> FrameStream:
        if self._is_part:
            raise VideoError("is in a shard or an object store; transcode videos before packing them")
        return FrameStream(self.path)

    def encoded_bytes(self) -> int:
        return self.row.length or self._ranges().size

    def content_key(self) -> int:
        try:
            return range_key(self._ranges())
        except VideoError:
            return 0

    @property
    def _is_part(self) -> bool:
        return self.row.length > 0 or is_url(self.row.path)

    def _content(self) -> VideoContent:
        """The video's bytes; of more than `LONG_FILE`, where they are."""
        return read_content(self._ranges())

    def _ranges(self) -> RangedContent:
        return row_content(self.path, self.row, self.packets, self.storage)


@dataclass(frozen=True)
class PictureFrames:
    """Frames of a folder of JPEG frames."""

    frames: JpegFrames
    indices: NDArray[np.int32]
    encoded: None = None

    def decode(
        self, roi: Roi | None, size: tuple[int, int], max_short_side: int | None = None
    ) -> NDArray[np.uint8]:
        return self.frames.decode(self.indices, roi, size=size, max_short_side=max_short_side)


@dataclass(frozen=True)
class FramesSource:
    """A folder of JPEG frames."""

    path: Path
    row: ManifestRow
    packets: PacketIndex | None
    storage: StorageOptions

    def read(self, indices: NDArray[np.int32], *, in_graph: bool = False) -> PictureFrames:
        inside = indices + np.int32(self.row.first_frame)
        frames = self.row.video_frames or self.row.frames
        return PictureFrames(JpegFrames.read(self.path, inside, frames), inside)

    def probe(self, *, deep: bool = False) -> VideoInfo:
        return probe_frames(self.path)

    def check_opens(self) -> None:
        list_frames(self.path)

    def stream(self) -> FolderStream:
        return FolderStream(self.path, Fraction(self.row.fps or DEFAULT_RATE).limit_denominator(1001))

    def encoded_bytes(self) -> None:
        return None

    def content_key(self) -> int:
        try:
            names = list_frames(self.path)
        except VideoError:
            return 0
        chosen = {names[0], names[len(names) // 2], names[-1]}
        return combined_key(len(names), *(content_key(self.path / name) for name in sorted(chosen)))


_CLASSES: dict[SourceKind, type[FileSource] | type[FramesSource]] = {
    SourceKind.FILE: FileSource,
    SourceKind.FRAMES: FramesSource,
}
