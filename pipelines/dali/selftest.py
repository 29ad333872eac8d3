"""Tests whether DALI decodes on this machine: it decodes a generated video as in a run.

    python -m pipelines.dali.selftest cuda:0

On a GPU the video is H.264 and NVDEC decodes it. On a CPU it is VP9, which DALI supports there.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from pipelines.dali.encoded_input import GraphDecoder, check_encoded
from pipelines.dali.errors import DALI_ERRORS, format_dali_error
from pipelines.dali.pipeline import decode_only
from pipelines.dali.sample_reader import Decoding
from pipelines.dataset.manifest import ManifestRow
from pipelines.synthetic.video_writer import H264, VP9, encode_video

SIDE = 128  # pixels; hardware decoders take nothing smaller than 48
FPS = 25
TOLERANCE = 6.0  # levels of 255: the error of a grey frame after coding and conversion


def decode_test_video(device: torch.device, frames: int) -> list[int]:
    """Make and decode a video, each frame of another grey; returns the shape of the result: T, H, W, 3.

    Raises one of `DALI_ERRORS` where DALI cannot decode it, and RuntimeError where it gives other frames.
    """
    gpu = device.type == "cuda"
    video_format, decoder = (H264 if gpu else VP9), GraphDecoder.for_device(gpu=gpu)
    greys = np.linspace(0, 255, frames, dtype=np.uint8)
    clip = np.repeat(greys, SIDE * SIDE * 3)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"selftest{video_format.extension}"
        encode_video(path, clip.reshape(frames, SIDE, SIDE, 3), video_format, FPS, frames)
        data = path.read_bytes()
    row = ManifestRow(
        path=path.name, offset=0, length=0, label=0, frames=frames, fps=float(FPS),
        width=SIDE, height=SIDE, codec=video_format.codec,
    )  # fmt: skip
    encoded = check_encoded(data, row, np.arange(frames), decoder)
    decoding = Decoding("dali", decoder)
    pipeline = decode_only(lambda _: vars(encoded), decoding, batch=1, threads=1, device=device)
    (decoded,) = pipeline.run()
    pictures = np.array(decoded.as_cpu()[0]).astype(float)
    wrong = np.abs(pictures.mean(axis=(1, 2, 3)) - greys) > TOLERANCE
    if wrong.any():
        raise RuntimeError(f"{wrong.sum()} of {frames} frames are not those that were encoded")
    return list(pictures.shape)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("device", type=torch.device, help="cpu, or cuda:0 and so on")
    parser.add_argument("--frames", type=int, default=16, help="of the clip (%(default)s)")
    arguments = parser.parse_args()
    try:
        shape = decode_test_video(arguments.device, arguments.frames)
    except DALI_ERRORS as error:
        sys.exit(format_dali_error(str(error)))
    print(json.dumps({"frames": shape[0]}))


if __name__ == "__main__":
    main()
