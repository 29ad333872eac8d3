"""Upload to MLflow what a run recorded while the server was down.

    python launch/deliver.py runs/NAME
    python launch/deliver.py runs/NAME --uri http://HOST:5000    # the whole history, to another server

Exit codes: 0 all is uploaded, 2 an error that the message explains, 85 MLflow cannot be reached or another
process is uploading: try again. Records that are not uploaded are kept.
"""

from pathlib import Path

from trainer.command import command_parser, prints_errors
from trainer.system.process_exit import exit_with
from trainer.tracking.mlflow_tracker import deliver_outbox


@prints_errors
def main() -> int:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("run_dir", type=Path, help="the run directory, which contains mlflow.jsonl")
    new_run = "upload the whole history to a new MLflow run, in place of a deleted one"
    add("--new-run", action="store_true", help=new_run)
    add("--uri", help="another MLflow address than the run's: the whole history is uploaded there")
    arguments = parser.parse_args()
    lines = deliver_outbox(arguments.run_dir, new_run=arguments.new_run, uri=arguments.uri)
    print(f"{lines} lines delivered from {arguments.run_dir}")
    return 0


if __name__ == "__main__":
    exit_with(main, "stopped: records that are not uploaded are kept")
