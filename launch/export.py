"""Write the weights of a checkpoint as one file that needs nothing else.

    python launch/export.py runs/quickstart --best --out best.safetensors
    python launch/export.py runs/quickstart/checkpoints/step-0000200

Exit codes: 0 done, 2 a mistake in what was asked (the message says which).
"""

import argparse
import logging
import sys
from pathlib import Path

from trainer import UserError


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="export.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("source", type=Path, help="a run's folder, or one of its checkpoints")
    parser.add_argument("--out", type=Path, default=Path("weights.safetensors"), help="file to write")
    parser.add_argument(
        "--best", action="store_true", help="of a run, the most accurate checkpoint, not the newest"
    )
    parser.add_argument(
        "--last",
        action="store_true",
        help="the weights of the last step, not their moving average (ema_decay)",
    )
    return parser.parse_args(arguments)


def main() -> int:
    arguments = parse()
    logging.basicConfig(format="%(levelname)s: %(message)s")
    from trainer.checkpoint.export import export

    try:
        state = export(arguments.source, arguments.out, best=arguments.best, average=not arguments.last)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    classes = len(state.description["class_names"])
    print(f"{arguments.out}: the weights after step {state.step}, {classes} classes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
