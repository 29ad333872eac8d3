"""Convert a model between this program's weights, the authors' naming and mmaction2's.

    python launch/convert.py k400_b16.pyth --to own --frames 8 --out k400_b16.safetensors
    python launch/convert.py runs/k400_b16 --to released --out k400_b16.pyth
    python launch/convert.py k710_l14.pyth --to mmaction2 --out k710_l14_mmaction2.pth
    python launch/convert.py k710_l14.pyth --to own --frames 8 --head k600 --out k600.safetensors

The source is a run directory, a checkpoint, a file of weights of this program, a released UniFormerV2
checkpoint or mmaction2's port of one. Tensors keep their values. Exit codes: 0 done, 2 an error that the
message explains, 130 interrupted: nothing is written.
"""

import argparse
import logging
from pathlib import Path

from pipelines.dataset.prepare.class_names import read_class_names
from pipelines.formatting import printable
from trainer.command import command_parser, prints_errors
from trainer.system.process_exit import exit_with


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("source", type=Path, help="run directory, checkpoint or file of weights")
    parser.add_argument(
        "--to", choices=("own", "released", "mmaction2"), required=True, help="naming to write"
    )
    out = "file to write: safetensors, or of the other two namings also .pyth, .pth or .pt"
    parser.add_argument("--out", type=Path, required=True, help=out)
    parser.add_argument("--frames", type=int, help="frames per clip of a released checkpoint, for `own`")
    parser.add_argument("--classes", type=read_class_names, help="text file: a class name per line, by row")
    parser.add_argument(
        "--labels",
        choices=("released", "mmaction2"),
        help="order of the rows of a source without class names (that of its naming)",
    )
    parser.add_argument(
        "--head", choices=("k400", "k600", "k700"), help="keep these rows of a Kinetics-710 head"
    )
    parser.add_argument("--last", action="store_true", help="of a run, the last weights, not the best")
    return parser.parse_args(arguments)


@prints_errors
def main() -> int:
    arguments = parse()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.ERROR)
    from trainer.export.conversion import convert  # imports PyTorch

    lines = convert(
        arguments.source,
        arguments.out,
        arguments.to,
        frames=arguments.frames,
        class_names=arguments.classes,
        labels=arguments.labels,
        head=arguments.head,
        last=arguments.last,
    )
    print(*map(printable, lines), sep="\n")
    return 0


if __name__ == "__main__":
    exit_with(main, "interrupted; nothing was written")
