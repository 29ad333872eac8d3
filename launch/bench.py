"""Measure where the time goes: data pipeline, model, training loop, checkpoints, ranks, and a GPU's on paper.

    python launch/bench.py pipeline     # clips per second of this loader and of PyTorch DataLoaders
    python launch/bench.py model        # forward and training step, beside the plain implementation
    python launch/bench.py train        # where each millisecond of a training step goes
    python launch/bench.py checkpoint   # saving and loading, beside the disk
    python launch/bench.py scale        # 1, 2 and 4 ranks
    python launch/bench.py budget       # what a step costs an H100, on paper: needs no GPU

Exit codes: 0 done; 2 nothing was measured, with the reason in the message; 130 interrupted (the results so
far are printed and written).
"""

import argparse
import sys
from collections.abc import Callable, Sequence

from rich.console import Console

from models import ModelError
from pipelines.errors import DataError
from trainer.benchmark import budget, checkpoints, loader_rate, loop_costs, model_speed, scaling
from trainer.benchmark.report import BenchmarkReport
from trainer.command import command_parser
from trainer.errors import UserError

JOBS = {
    "pipeline": loader_rate,
    "model": model_speed,
    "train": loop_costs,
    "checkpoint": checkpoints,
    "scale": scaling,
    "budget": budget,
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    jobs = parser.add_subparsers(dest="job", required=True, metavar="JOB")
    for name, module in JOBS.items():
        job = jobs.add_parser(name, help=module.HELP, description=module.__doc__)
        module.add_arguments(job)
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> int:
    if args.job == "pipeline":
        return loader_rate.run(args)
    measure: Callable[[argparse.Namespace, BenchmarkReport], None] = JOBS[args.job].run
    report, code = BenchmarkReport(args.job), 0
    try:
        measure(args, report)
    except KeyboardInterrupt:
        if not report.tables:
            raise
        code = 130
    report.print(Console(width=None if sys.stdout.isatty() else 200))
    report.write(args.out)
    print(f"wrote results.json and results.md to {args.out}")
    return code


if __name__ == "__main__":
    try:
        sys.exit(run(parse()))
    except (DataError, ModelError, UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; nothing was measured", file=sys.stderr)
        sys.exit(130)
