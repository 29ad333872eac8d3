"""Deliver to MLflow what a run recorded while the server was gone: `python launch/deliver.py runs/NAME`."""

import argparse
import sys
from pathlib import Path

from trainer import UserError
from trainer.tracking.tracker import deliver_spool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, help="the run's folder, which holds mlflow.jsonl")
    run_dir: Path = parser.parse_args().run_dir
    try:
        lines = deliver_spool(run_dir)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{lines} lines delivered from {run_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
