"""Train a chain of recipes, each from the weights of the one before.

    python launch/chain.py k400_l14_336_64f [--check]
    python launch/chain.py k400_l14_336_64f --slurm --nodes 8 --gpus-per-node 8

Finished stages are skipped: the same command again continues the chain. With --slurm, each stage is a job
that starts when the one before has succeeded; a stage whose job is in the queue keeps it. Exit codes: as
launch/train.py; with --slurm 0 submitted, 2 a mistake.
"""

import argparse
import shlex
import sys
from functools import partial
from pathlib import Path

from launch.cli import command_line
from trainer.cluster.chain import Stage, is_finished, load_chain
from trainer.cluster.job_options import add_job_options, job_request, parse_with_slurm
from trainer.cluster.submit import plan_submission
from trainer.cluster.submit_chain import preview_chain, submit_chain
from trainer.command import command_parser, prints_errors
from trainer.errors import RunError
from trainer.system.child_process import run_child
from trainer.system.process_exit import exit_with, format_os_error


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("chain", type=Path, help="YAML file, or the name of one in recipes/chains/")
    add("--set", action="append", default=[], metavar="section.field=value", help="of all stages; repeatable")
    add("--run-dir", type=Path, help="folder of the stages' run directories (each recipe's run.dir)")
    add("--check", action="store_true", help="check every stage as train --check does, and leave")
    add("--ranks", type=int, help="with --check: as if so many ranks took part")
    add("--slurm", action="store_true", help="submit a job for each stage; the options below are for it")
    add("--dry-run", action="store_true", help="with --slurm: print the scripts, submit and write nothing")
    add_job_options(parser)
    args = parse_with_slurm(parser, arguments, ("dry_run",))
    if args.ranks is not None and (args.ranks < 1 or not args.check):
        parser.error("--ranks is a number of at least 1, and for --check")
    return args


def check(stages: list[Stage], ranks: int | None) -> int:
    """Check every stage. Returns the first exit code that is not 0."""
    codes = []
    for number, stage in enumerate(stages, 1):
        arguments = [*stage.arguments, "--check", *(["--ranks", str(ranks)] if ranks else [])]
        print(f"stage {number} of {len(stages)}: {stage.name}", flush=True)
        if stage.weights is not None and not stage.weights.is_file():
            arguments += ["--set", "model.weights=null"]
            print(f"its weights, {stage.weights}, do not exist yet: checked without", flush=True)
        codes.append(run_child(command_line("train", arguments)))
    return next((code for code in codes if code), 0)


def train(stages: list[Stage]) -> int:
    """Train the stages that are not finished. Returns the exit code of the last that was started."""
    for number, stage in enumerate(stages, 1):
        done = is_finished(stage)
        print(f"stage {number} of {len(stages)}: {stage.name}{', finished' if done else ''}", flush=True)
        if not done and (code := run_child(command_line("train", stage.arguments))):
            return code
    return 0


def submit_stages(stages: list[Stage], args: argparse.Namespace) -> int:
    """Submit a job for each stage that is not finished and has none, after all were planned."""
    made_by = shlex.join(["python", *sys.argv]).replace("\n", " ")
    plan = partial(plan_submission, made_by=made_by, needs_data=not args.dry_run)
    planned = [
        plan(job_request(args, stage.name), [stage.variant], home=stage.run_dir)
        for stage in stages
        if not is_finished(stage)
    ]
    if args.dry_run:
        print(*(f"{text}\n\n" for text in preview_chain(planned)), sep="", end="")
    else:
        submit_chain(planned)
    if not planned:
        print("all stages are finished")
    return 0


@prints_errors
def main() -> int:
    args = parse()
    stages = load_chain(args.chain, args.set, args.run_dir)
    if args.check:
        return check(stages, args.ranks)
    try:
        return submit_stages(stages, args) if args.slurm else train(stages)
    except OSError as error:
        raise RunError(format_os_error(error)) from error


if __name__ == "__main__":
    exit_with(main, "interrupted; the same command continues")
