"""Predict the classes of videos: files, folders, or long videos window by window.

    python launch/predict.py --weights runs/mine holiday.mp4
    python launch/predict.py --weights runs/mine videos/ --json > predictions.jsonl
    python launch/predict.py --weights weights.safetensors match.mp4 --window 2 --stride 1 --annotate out/
    python launch/predict.py --weights k400_b16_8f.pth --frames 8 --classes k400.txt holiday.mp4

Exit codes: 0 done, 2 some videos are unusable (each is named, the others are predicted) or another error that
the message explains, 130 or 143 interrupted.
"""

import argparse
import logging
import os
import sys
from pathlib import Path

from trainer.command import command_parser, prints_errors
from trainer.system.process_exit import exit_on_sigterm, exit_with


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("videos", type=Path, nargs="+", metavar="VIDEO", help="a file, or a folder of videos")
    source = "a run directory (its best evaluation), a checkpoint, or a file of weights, also a released one"
    add("--weights", type=Path, required=True, help=source)
    add("--last", action="store_true", help="of a run, the weights of the last step")
    add("--frames", type=int, help="frames per clip, for a released checkpoint")
    add("--classes", type=Path, help="class names, one per line, in the order of the outputs")
    add("--top", type=int, default=5, metavar="K", help="number of classes (%(default)s)")
    add("--clips", type=int, default=1, help="clips per video (%(default)s)")
    add("--crops", type=int, default=1, help="crops per clip, 1 or 3 (%(default)s)")
    add("--window", type=float, metavar="SECONDS", help="length of sliding windows")
    add("--stride", type=float, metavar="SECONDS", help="between two windows (the length)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--json", dest="form", action="store_const", const="json", help="one JSON line per video"
    )
    form.add_argument("--csv", dest="form", action="store_const", const="csv", help="one line per class")
    add("--annotate", type=Path, metavar="DIR", help="write videos with the classes drawn into them")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:1 (%(default)s)")
    add("--workers", type=int, metavar="N", help="processes that decode; 0 for none")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> int:
    from trainer.inference.video_list import list_videos

    paths = list_videos(arguments.videos)  # before the slow imports

    from pipelines.dataset.prepare.class_names import read_class_names
    from trainer.inference.predict_videos import PredictOptions, predict_videos
    from trainer.inference.prediction_output import choose_writer
    from trainer.inference.predictor import load

    names = None if arguments.classes is None else read_class_names(arguments.classes)
    source = {"last": arguments.last, "frames": arguments.frames, "class_names": names}
    predictor = load(arguments.weights, arguments.device, **source)
    options = PredictOptions(
        **{name: getattr(arguments, name) for name in PredictOptions.__dataclass_fields__}
    )
    bad = predict_videos(predictor, paths, options, choose_writer(arguments.form or "table"))
    if bad:
        print(f"{bad} of {len(paths)} videos could not be used completely", file=sys.stderr)
    return 2 if bad else 0


@prints_errors
def main() -> int:
    logging.basicConfig(format="%(levelname)s: %(message)s")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        return run(parse())
    except BrokenPipeError:  # as with `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    exit_on_sigterm("run the same command again")
    exit_with(main, "interrupted")
