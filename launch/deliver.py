"""Deliver to MLflow what a run recorded while the server was gone.

    python launch/deliver.py runs/NAME
    python launch/deliver.py runs/NAME --uri http://HOST:5000    # the whole history, to another server

Exit codes: 0 all is delivered, 2 something must be mended (the message says what), 85 MLflow cannot be
reached, or another process is delivering: to be tried again. What is not delivered is kept.
"""

import argparse
import sys
from pathlib import Path

from trainer.errors import StartAgain, UserError
from trainer.resilience.signals import REQUEUE
from trainer.system.process_exit import exit_with
from trainer.tracking.mlflow_tracker import deliver_outbox


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, help="the run's folder, which holds mlflow.jsonl")
    parser.add_argument(
        "--new-run",
        action="store_true",
        help="deliver the whole history to a new MLflow run, in place of one that was deleted",
    )
    parser.add_argument(
        "--uri",
        help="MLflow's address, where it is another than the run's: the whole history goes there",
    )
    arguments = parser.parse_args()
    try:
        lines = deliver_outbox(arguments.run_dir, new_run=arguments.new_run, uri=arguments.uri)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return REQUEUE if isinstance(error, StartAgain) else 2
    print(f"{lines} lines delivered from {arguments.run_dir}")
    return 0


if __name__ == "__main__":
    exit_with(main, "stopped: what is not delivered is kept")
