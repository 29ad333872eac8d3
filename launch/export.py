"""Export a trained model to a file or folder for other programs.

    python launch/export.py runs/quickstart --best --out best.safetensors
    python launch/export.py runs/quickstart --format onnx --out model.onnx
    python launch/export.py runs/quickstart --best --format huggingface --out my-model

Formats: safetensors (weights, class names, preprocessing), onnx, torch (torch.export), huggingface (a folder
with a model card). The last three are loaded again and their logits compared with the model's. Exit codes: 0
done, 2 an error that the message explains, 130 interrupted: nothing is written.
"""

import argparse
import logging
import sys
from pathlib import Path

from pipelines.formatting import printable
from trainer.command import command_parser, prints_errors
from trainer.monitoring.run_dir import check_not_of_run
from trainer.system.process_exit import exit_with

OTHERS = ("onnx", "torch", "huggingface")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    source = "a run directory or a checkpoint; except for safetensors also a file of weights"
    add("source", type=Path, help=source)
    add("--format", choices=("safetensors", *OTHERS), default="safetensors", help="(%(default)s)")
    out = "file or folder to write (weights.safetensors, model.onnx, model.pt2, model)"
    add("--out", type=Path, help=out)
    add("--best", action="store_true", help="of a run, the most accurate checkpoint, not the newest")
    add("--last", action="store_true", help="the weights of the last step, not their EMA (ema_decay)")
    add("--frames", type=int, help="frames per clip, for a released checkpoint")
    parsed = parser.parse_args(arguments)
    if parsed.frames is not None and parsed.format == "safetensors":
        parser.error("--frames needs a released checkpoint and another format than safetensors")
    return parsed


@prints_errors
def main() -> int:
    arguments = parse()
    logging.basicConfig(format="%(levelname)s: %(message)s")
    return write_other(arguments) if arguments.format in OTHERS else write_weights(arguments)


def write_weights(arguments: argparse.Namespace) -> int:
    from trainer.checkpoint.export import export

    out = arguments.out or Path("weights.safetensors")
    check_not_of_run(out)
    state = export(arguments.source, out, best=arguments.best, average=not arguments.last)
    classes = len(state.description["class_names"])
    print(f"{printable(out)}: the weights after step {state.step}, {classes} classes")
    return 0


def write_other(arguments: argparse.Namespace) -> int:
    from trainer.export.export_source import read_source
    from trainer.export.formats import FORMATS, check_export, export_as

    out = arguments.out or Path(FORMATS[arguments.format].default)
    check_not_of_run(out)
    check_export(arguments.format, out)
    source = read_source(
        arguments.source, best=arguments.best, average=not arguments.last, frames=arguments.frames
    )
    print(
        f"writing {printable(out)} and comparing it with the model; this takes up to a few minutes",
        file=sys.stderr,
    )
    difference = export_as(arguments.format, source, out)
    step = "" if source.step is None else f" after step {source.step}"
    classes = len(source.weights.class_names)
    print(
        f"{printable(out)}: the model{step}, {classes} classes; its logits differ by {difference:.1e} at most"
    )
    return 0


if __name__ == "__main__":
    exit_with(main, "interrupted; nothing was written")
