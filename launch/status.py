"""Print the status of runs: state, step, time left, restarts, last loss and accuracy, and where.

    python launch/status.py                              # all in runs/, with those of sweeps
    python launch/status.py runs/l14 runs/l14-sweep --watch 30
    python launch/status.py --json

Columns: `left` is the time of the remaining steps at the latest pace; `again` how often the run was started
again; `seen` the time since it last recorded something; `where` SLURM's job and nodes, or the host.
Exit codes: 0 printed, 2 a mistake in the command (see the message).
"""

import argparse
import time
from contextlib import suppress
from pathlib import Path

from trainer.cluster.status import collect_statuses, format_json, print_overview
from trainer.command import command_parser, prints_errors
from trainer.system.process_exit import exit_with
from trainer.system.terminal import PipeConsole


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    about = "a run directory, or one that holds some (runs)"
    parser.add_argument("places", nargs="*", type=Path, metavar="FOLDER", help=about)
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--watch", type=float, metavar="SECONDS", help="print it again so often, until Ctrl-C")
    shown.add_argument("--json", action="store_true", help="a list with an object per run")
    parsed = parser.parse_args(arguments)
    if parsed.watch is not None and not parsed.watch > 0:
        parser.error(f"--watch {parsed.watch:g}: more than 0 seconds")
    return parsed


def show(arguments: argparse.Namespace) -> None:
    console = PipeConsole()
    while True:
        overview = collect_statuses(arguments.places or [Path("runs")])
        if arguments.json:
            print(format_json(overview))
            return
        if arguments.watch is None:
            print_overview(overview, console)
            return
        console.clear()  # in a terminal only
        console.print(time.strftime("%H:%M:%S"), highlight=False)
        print_overview(overview, console)
        time.sleep(arguments.watch)


@prints_errors
def main() -> int:
    with suppress(KeyboardInterrupt, BrokenPipeError):  # the second as of `| head`
        show(parse())
    return 0


if __name__ == "__main__":
    exit_with(main, "interrupted")
