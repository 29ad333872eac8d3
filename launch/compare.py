"""Compare runs: recipes, results, data, significance, curves.

    python launch/compare.py runs/b16 runs/l14      # run directories, or folders of them
    python launch/compare.py --experiment quickstart --filter "metrics.`val/top1` > 0.5" --out report.html
    python launch/compare.py RUN_ID runs/b16 --baseline runs/b16    # or MLflow's ids of runs
    python launch/compare.py --experiment sweep --log-to parent     # saved into the sweep's MLflow run

Significance needs `scores.parquet` in the run directories. Exit codes: 0 done, 2 a mistake in the command
(the message names it), 85 MLflow does not answer: try again, 130 Ctrl-C.
"""

import argparse
import logging
import sys
from pathlib import Path

from trainer.command import command_parser, prints_errors
from trainer.errors import RunError
from trainer.monitoring.progress import show_progress
from trainer.system.process_exit import exit_with
from trainer.system.terminal import PipeConsole
from trainer.tracking.comparison.command import RunReader, check_output, save_to_mlflow, write_report
from trainer.tracking.comparison.compare import compare
from trainer.tracking.comparison.render import print_report
from trainer.tracking.comparison.report import as_json, report


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="a run directory, a folder of them, or an MLflow id")
    add("--experiment", metavar="NAME", help="all runs of this MLflow experiment")
    add("--filter", metavar="TEXT", help="the runs in MLflow that match this filter")
    add("--uri", metavar="ADDRESS", help="MLflow's (MLFLOW_TRACKING_URI, sqlite:///mlflow.db)")
    add("--baseline", metavar="RUN", help="what the others are compared with (the best)")
    add("--out", type=Path, metavar="FILE", help="write the report: .html or .md")
    add("--json", action="store_true", help="print JSON instead of tables")
    add("--log-to", metavar="RUN_ID", help="save it in this MLflow run; `parent`: the runs' parent")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> None:
    if not arguments.runs and arguments.experiment is None and arguments.filter is None:
        raise RunError("name runs: folders, MLflow's ids of runs, --experiment NAME or --filter TEXT")
    if arguments.out is not None:
        check_output(arguments.out)
    reader = RunReader(
        arguments.runs, arguments.experiment, arguments.filter, arguments.uri, arguments.baseline
    )
    try:
        with show_progress("reading runs", sys.stderr) as progress:
            found, baseline = reader.read(progress)
        with show_progress("comparing", sys.stderr) as progress:
            comparison = compare(found, baseline, progress)
        blocks = report(comparison, curves=arguments.out is not None or arguments.log_to is not None)
        if arguments.json:
            print(as_json(comparison))
        else:
            print_report(blocks, PipeConsole())
        if arguments.out is not None:
            written = write_report(blocks, arguments.out)
            print(f"written: {', '.join(map(str, written))}", file=sys.stderr)
        if arguments.log_to is not None:
            run_id = save_to_mlflow(comparison, blocks, arguments.log_to, reader.connect)
            print(f"saved in MLflow run {run_id}: comparison/", file=sys.stderr)
    finally:
        reader.close()


@prints_errors
def main() -> int:
    arguments = parse()
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        run(arguments)
    except BrokenPipeError:  # as of `| head`
        sys.stderr.close()
    return 0


if __name__ == "__main__":
    exit_with(main, "stopped: nothing was changed")
