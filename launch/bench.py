"""Measure where the time goes: data pipeline, model, training loop, checkpoints, ranks, and a GPU's on paper.

    python launch/bench.py pipeline     # clips per second of this loader and of PyTorch DataLoaders
    python launch/bench.py model        # forward and training step, beside the plain implementation
    python launch/bench.py train        # where each millisecond of a training step goes
    python launch/bench.py checkpoint   # saving and loading, beside the disk
    python launch/bench.py scale        # 1, 2 and 4 ranks
    python launch/bench.py budget       # what a step costs an H100, on paper: needs no GPU

Exit codes: 0 done, 2 an error (see the message), 130 or 143 interrupted. However it ends, what was measured
until then is printed and written.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

from rich.console import Console

from pipelines.formatting import printable
from trainer.benchmark import budget, checkpoints, loader_rate, loop_costs, model_speed, scaling
from trainer.benchmark.arguments import check_output
from trainer.benchmark.report import BenchmarkReport, written_at
from trainer.command import command_parser, prints_errors
from trainer.errors import RunError
from trainer.system.process_exit import exit_on_sigterm, exit_with, format_os_error

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


def run(args: argparse.Namespace) -> None:
    """Measure, then print and write the results, also those before an error.

    Results of an earlier run stay until there are new ones. A message says so after an error without any.
    """
    check_output(args.out)
    earlier = written_at(args.out)
    try:
        measure(args)
    except BaseException:
        if earlier is not None and written_at(args.out) == earlier:
            print(f"the results in {printable(args.out)} are of an earlier run", file=sys.stderr)
        raise


def measure(args: argparse.Namespace) -> None:
    """As `run`, without a word on results of an earlier run."""
    if args.job == "pipeline":
        loader_rate.run(args)
        return
    job: Callable[[argparse.Namespace, BenchmarkReport], None] = JOBS[args.job].run
    report = BenchmarkReport(args.job)
    try:
        job(args, report)
    except BaseException:
        try:
            deliver(report, args)
        except OSError as error:  # the first error is the one to show
            print(f"the results until the error are not written: {format_os_error(error)}", file=sys.stderr)
        raise
    deliver(report, args)


def deliver(report: BenchmarkReport, args: argparse.Namespace) -> None:
    """Print and write the results, if there are any. Raises OSError."""
    if report.tables:
        report.print(Console(width=None if sys.stdout.isatty() else 200))
        report.write(args.out)
        print(f"wrote results.json and results.md to {args.out}", flush=True)


@prints_errors
def main() -> int:
    exit_on_sigterm("the same command measures again")
    try:
        run(parse())
    except OSError as error:
        raise RunError(format_os_error(error)) from error
    return 0


if __name__ == "__main__":
    exit_with(main, "interrupted; the same command measures again")
