"""Run an ablation of the paper: a grid of trainings, and its table beside the paper's numbers.

    python launch/ablate.py table9b --check
    python launch/ablate.py table9b --seeds 3 [--rows "MHSA|Conv"] [--set section.field=value]
    python launch/ablate.py table9b --slurm --array 4 --nodes 1 --gpus-per-node 8

The trainings run one after another, or as one SLURM array. What is finished is skipped: the same command
again continues. --table prints the table of what is finished. Exit codes: 0 done or submitted, 2 a mistake or
a failed training, 85 and 130 stopped, as launch/train.py.
"""

import argparse
import shlex
import sys
from functools import partial
from pathlib import Path

from launch.cli import command_line
from pipelines.arguments import integer
from trainer.cluster.job_options import add_job_options, job_request, parse_with_slurm
from trainer.cluster.submit import format_submission, plan_submission, preview, submit
from trainer.command import command_parser, prints_errors
from trainer.errors import RunError
from trainer.paper.ablation import MAX_SEEDS, Ablation, load_ablation
from trainer.system.process_exit import exit_with, format_os_error
from trainer.system.terminal import PipeConsole
from trainer.tracking.comparison.render import print_report
from trainer.tracking.sweep_run import create_sweep_run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("ablation", type=Path, help="YAML file, or the name of one in recipes/ablations/")
    seeds = integer(1, MAX_SEEDS)
    add("--seeds", type=seeds, default=1, metavar="N", help="trainings of each design (%(default)s)")
    add("--rows", metavar="REGEX", help="only the designs whose name matches")
    add("--set", action="append", default=[], metavar="section.field=value", help="of all; repeatable")
    add("--run-dir", type=Path, help="folder of the run directories (run.dir of the recipe / the name)")
    add("--check", action="store_true", help="check every design, name what is missing here, and leave")
    add("--table", action="store_true", help="print and write the table of what is finished, and leave")
    add("--slurm", action="store_true", help="submit an array of jobs; the options below are for it")
    add("--array", type=int, metavar="N", help="with --slurm: at most so many at once (all)")
    add("--dry-run", action="store_true", help="with --slurm: print the script, submit and write nothing")
    add_job_options(parser)
    return parse_with_slurm(parser, arguments, ("array", "dry_run"))


def check(ablation: Ablation) -> int:
    from trainer.paper.check import check as check_all

    blocks, problems = check_all(ablation)
    print_report(blocks, PipeConsole())
    if problems:
        raise RunError("\n  - ".join(["the ablation could not start here:", *problems]))
    return 0


def run(ablation: Ablation, args: argparse.Namespace, home: Path) -> int:
    from trainer.paper.runner import train_all, unfinished

    stages = unfinished(ablation, args.seeds, home)
    tracking = ablation.cells[0].variant.recipe.tracking
    # The same in each call, with any --rows and --seeds: MLflow refuses a changed value.
    params = {"ablation": ablation.name}
    parent = create_sweep_run(home, tracking, params) if stages and not args.dry_run else None
    if not args.slurm:
        print(f"{len(ablation.runs(args.seeds, home)) - len(stages)} finished, {len(stages)} to train")
        return train_all(stages, home, lambda arguments: command_line("train", arguments), parent)
    if stages:
        made_by = shlex.join(["python", *sys.argv]).replace("\n", " ")
        request = job_request(args, ablation.name, at_once=args.array)
        folder = home if len(stages) > 1 else stages[0].run_dir
        plan = partial(plan_submission, made_by=made_by, parent=parent, needs_data=not args.dry_run)
        planned = plan(request, [each.variant for each in stages], home=folder)
        print(preview(planned) if args.dry_run else format_submission(planned, submit(planned, after=None)))
    return 0


@prints_errors
def main() -> int:
    args = parse()
    ablation = load_ablation(args.ablation, args.set, args.rows)
    home = args.run_dir or ablation.cells[0].variant.recipe.run.dir / ablation.name
    if args.check:
        return check(ablation)
    try:
        code = 0 if args.table else run(ablation, args, home)
    except OSError as error:
        raise RunError(format_os_error(error)) from error
    if not args.slurm:
        from trainer.paper.results import save_results

        print_report(save_results(ablation, args.seeds, home), PipeConsole())
    return code


if __name__ == "__main__":
    exit_with(main, "interrupted; the same command continues")
