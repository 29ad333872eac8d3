"""What the script of a SLURM job runs at the beginning and at the end of each attempt.

    python launch/slurm/turn.py begin --recipe R ...                 # prints the folder for the ranks' logs
    python launch/slurm/turn.py end --code 85 --state RUNNING --recipe R ...

Exit codes: at the beginning 0, with nothing printed where the run needs no further attempt, or 2 with the
reason why none begins; at the end the exit code of the job, 85 where the script has to requeue it first.
"""

import argparse
import os
import sys

from launch.train import parse as parse_training
from pipelines.errors import DataError
from trainer.cluster.requeue import Attempt, Attempts
from trainer.config.load import load_recipe
from trainer.errors import UserError


def parse(arguments: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="turn.py", allow_abbrev=False, description=__doc__)
    parser.add_argument("moment", choices=("begin", "end"))
    parser.add_argument("--code", type=int, help="at the end: exit code of the training")
    parser.add_argument("--state", default="UNKNOWN", help="at the end: SLURM's state of the job")
    return parser.parse_known_args(arguments)


def main() -> int:
    arguments, rest = parse()
    training = parse_training(rest)
    recipe = load_recipe(training.recipe, training.set)
    attempts = Attempts(training.run_dir or recipe.run.dir / recipe.name)
    attempt = this_attempt()
    if arguments.moment == "begin":
        logs = attempts.begin(attempt)
        if logs is None:
            print("the run is done, stopped or given up: this job has nothing to do", file=sys.stderr)
        else:
            print(logs)
        return 0
    end = attempts.end(attempt, code=arguments.code, state=arguments.state)
    print(f"job {attempt.job}: {end.outcome}: {end.reason}", flush=True)
    return end.code


def this_attempt() -> Attempt:
    """From the variables that SLURM and the script set."""
    variables = os.environ
    if "SLURM_JOB_ID" not in variables:
        sys.exit("error: SLURM_JOB_ID is not set: only a job's script runs this, launch/slurm/train.sbatch")
    number = variables["SLURM_JOB_ID"]
    if "SLURM_ARRAY_TASK_ID" in variables:
        number = f"{variables['SLURM_ARRAY_JOB_ID']}_{variables['SLURM_ARRAY_TASK_ID']}"
    return Attempt(
        number,
        int(variables.get("SLURM_RESTART_COUNT", "0")),
        variables.get("SLURM_JOB_NODELIST", ""),
        chained=variables.get("CHAINED") == "yes",
        submitted=float(variables.get("SUBMITTED", "0")),
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (UserError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
