"""Annotations as each data set publishes them, a dozen rows each, with the local files that they name.

The files in `dataset/prepare/data` were written by hand after the published formats. Ids and class names have
the form of the real ones, and each known irregularity of the formats occurs.
"""

import shutil
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from pipelines.synthetic.video_writer import MJPEG, encode_video
from tests.pipelines.jpegs import write_frames
from tests.pipelines.videos import moving_picture

DATA = Path(__file__).parent / "dataset" / "prepare" / "data"

SECONDS, RATE = 12, 5
"""Length and frames per second of the local videos."""

HEIGHT, WIDTH = 48, 64


@dataclass(frozen=True)
class Published:
    """One annotation format.

    {data} in a job is the folder of the annotations, {local} that of the local files.
    """

    job: str
    """Arguments of `prepare`."""
    files: tuple[str, ...] = ()
    """Local videos."""
    folders: tuple[str, ...] = ()
    """Local folders of JPEG frames."""
    val: str | None = None
    """The same as `job` for the validation manifest; None where the training manifest serves as one."""

    def arguments(self, local: Path, *, val: bool = False) -> list[str]:
        text = self.val if val else self.job
        assert text is not None
        return [part.format(data=DATA, local=local) for part in text.split()]


_ANET = "activitynet {data}/activity_net.v1-3.min.json --videos {local} --subset "
_HACS = "hacs {data}/HACS_segments_v1.1.1.json --videos {local} --subset "
_CLIPS = "hacs {data}/HACS_clips_v1.1.1.csv --videos {local} --subset "

_KINETICS_FILES = (
    "abseiling/_4YTwq0-73Y_000015_000025.avi",
    "abseiling/-3B32lodo2M.avi",  # without times
    "-0JAGfVTQJs_0_10.avi",
    "2cPLjY5AWXU_000002_000012.avi",
    "--DXfJ4ZJVA_000204_000214.avi",
    "8Bd4mjuz8Gs.avi",  # two clips of one video
    "BnwOvT0SvVk_000001_000011.avi",
    "zzzzzzzz_-0_000120_000130.avi",
    "other_video_000000_000010.avi",
)
_HACS_FILES = (
    "Dodgeball/v_--0edUL8zmA.avi",
    "Archery/a2X2hz1G6i8.avi",
    "v_NUdji_CqvcY.avi",
    "0O_qMHxBfXg.avi",
)

FORMATS = {
    "kinetics": Published(
        "kinetics {data}/kinetics400_train.csv --videos {local} --version 400", _KINETICS_FILES
    ),
    "kinetics710": Published(
        "kinetics710 --train {data}/kinetics400_train.csv {data}/kinetics600_train.csv "
        "{data}/kinetics700_train.json --held-out {data}/kinetics400_val.csv {data}/kinetics700_test.csv "
        "--videos {local}",
        (*_KINETICS_FILES, "tie600tie60_000003_000013.avi", "kkkkkkkk700_000040_000050.avi"),
    ),
    "mit": Published(
        "mit {data}/trainingSet.csv --videos {local} --categories {data}/moments_categories.txt",
        (
            "clapping/flickr-0-1-2-5-1-6-7-1-12516_2.mp4",
            "clapping/yt-7YSxdMBDLoQ_24.mp4",
            "adult+male+singing/getty-singing-0012.mp4",
            "adult+male+singing/metacafe-x_y_7.mp4",
            "praying/giphy-a,b.mp4",
            "praying/vine-praying_001.mp4",
            "praying/flickr-two-labels_3.mp4",
        ),
    ),
    "ssv1": Published(
        "ssv1 {data}/something-something-v1-train.csv --frames {local} "
        "--labels {data}/something-something-v1-labels.csv",
        folders=(*(f"20bn/{number}" for number in (100218, 24413, 48032, 12, 73196, 86000, 31000)), "more/5"),
        val="ssv1 {data}/something-something-v1-validation.csv --frames {local} "
        "--labels {data}/something-something-v1-labels.csv",
    ),
    "ssv2": Published(
        "ssv2 {data}/something-something-v2-train.json --videos {local} "
        "--labels {data}/something-something-v2-labels.json",
        tuple(f"{number}.avi" for number in (78687, 42326, 100904, 7, 64760)),
    ),
    "activitynet": Published(
        _ANET + "training",
        (
            "v_--1DO2V4K74.avi",
            "-2VzSMAdzl4.avi",
            "v_v_k-eF6rJrz.avi",  # an id that begins with v_
            "7IVvFgOZIYI_000005_000012.avi",  # a segment alone
            "v_7IVvFgOZIYI_100_118.avi",  # fits two segments
            "twolabels_-.avi",
            "v_validation1.avi",
            "validation2.avi",
            "validation3.avi",
        ),
        val=_ANET + "validation",
    ),
    "hacs": Published(_HACS + "training", _HACS_FILES, val=_HACS + "validation"),
    "hacs_clips": Published(_CLIPS + "training", _HACS_FILES, val=_CLIPS + "validation"),
}


def make_local_files(published: Published, folder: Path) -> Path:
    """Write the local videos and frames of a format, all with the same content; returns the folder."""
    pictures = moving_picture(SECONDS * RATE, HEIGHT, WIDTH)
    folder.mkdir(parents=True)
    video = folder.parent / "one.avi"
    if published.files:
        encode_video(video, pictures, MJPEG, Fraction(RATE), keyframe_interval=1)
    for name in published.files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, folder / name)
    for name in published.folders:
        write_frames(folder / name, pictures[: 2 * RATE])
    return folder
