"""Explain a prediction: class activation, and the attention of the global blocks.

    python launch/explain.py runs/quickstart data/motion/val/grow/000006.mp4
    python launch/explain.py weights.safetensors dance.mp4 --class "salsa dancing" --out s.png --video s.mp4
    python launch/explain.py k400_b16_8f.pth dance.mp4 --frames 8 --classes k400.txt --json

The sheet has rows for the frames, the class activation and each global block. The video has the frames, the
class activation and the last block's attention side by side. Exit codes: 0 done, 2 an error that the message
explains, 130 or 143 interrupted.
"""

import argparse
import json
from pathlib import Path

from pipelines.formatting import printable
from trainer.command import command_parser, prints_errors
from trainer.system.process_exit import exit_on_sigterm, exit_with


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("source", type=Path, help="a run directory, a checkpoint, or a file of weights")
    add("video", type=Path)
    add("--class", dest="name", metavar="NAME", help="class to explain (the most likely one)")
    add("--out", type=Path, help="the contact sheet, a PNG (VIDEO's name with -explained.png)")
    add("--video", type=Path, dest="overlay", metavar="FILE", help="also write an MP4 with overlaid maps")
    add("--last", action="store_true", help="of a run, the weights of the last step")
    add("--frames", type=int, help="frames per clip, for a released checkpoint")
    add("--classes", type=Path, help="class names, one per line, in the order of the outputs")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:1 (%(default)s)")
    add("--json", action="store_true", help="print the result as one JSON object")
    return parser.parse_args(arguments)


@prints_errors
def main() -> int:
    arguments = parse()
    from pipelines.dataset.prepare.class_names import read_class_names
    from trainer.inference.model_source import open_model
    from trainer.inference.predictor import choose_device
    from trainer.inspection.contact_sheet import save_sheet
    from trainer.inspection.explanation import Explainer
    from trainer.inspection.explanation_pictures import (
        as_json,
        check_output_paths,
        explanation_sheet,
        write_overlay,
    )

    sheet = arguments.out or Path(f"{arguments.video.stem}-explained.png")
    check_output_paths(arguments.video, sheet, arguments.overlay)
    names = None if arguments.classes is None else read_class_names(arguments.classes)
    device = choose_device(arguments.device)
    weights = open_model(arguments.source, last=arguments.last, frames=arguments.frames, class_names=names)
    found = Explainer(weights, device).explain(arguments.video, arguments.name)
    save_sheet(sheet, explanation_sheet(found))
    if arguments.overlay is not None:
        write_overlay(arguments.overlay, found)
    if arguments.json:
        print(json.dumps(as_json(found, sheet, arguments.overlay), indent=1))
        return 0
    print(f"{printable(found.name)}: probability {found.probability:.3f}")
    for each in found.maps:
        print(f"{each.about}: {each.strength}")
    print("wrote", " and ".join(printable(path) for path in (sheet, arguments.overlay) if path is not None))
    return 0


if __name__ == "__main__":
    exit_on_sigterm("run the same command again")
    exit_with(main, "interrupted")
