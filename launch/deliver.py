"""Deliver to MLflow what a run recorded while the server was gone: `python launch/deliver.py runs/NAME`."""

import argparse
import sys
from pathlib import Path

from trainer import UserError
from trainer.tracking.tracker import deliver_spool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, help="the run's folder, which holds mlflow.jsonl")
    parser.add_argument(
        "--new-run",
        action="store_true",
        help="deliver the whole history to a new MLflow run, in place of one that was deleted",
    )
    arguments = parser.parse_args()
    try:
        lines = deliver_spool(arguments.run_dir, new_run=arguments.new_run)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{lines} lines delivered from {arguments.run_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
