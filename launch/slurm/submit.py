"""Submit a training to SLURM, a sweep of several, or the parts of a manifest: checked, written, queued.

    python launch/slurm/submit.py --recipe recipes/k710_l14.yaml --nodes 4 --gpus-per-node 8 --time 24:00:00
    python launch/slurm/submit.py --recipe R --vary optimisation.learning_rate=1e-5,2e-5,4e-5 --nodes 1 ...
    python launch/slurm/submit.py --parts 16 --cpus-per-rank 16 -- folder VIDEOS --out data/train.arrow

The arguments after `--` go to launch/train.py, with --parts to launch/prepare.py. The same command again
continues the run, also with another --nodes, and the parts.
Exit codes: 0 submitted, or printed with --dry-run; 2 a mistake (see the message).
"""

import argparse
import shlex
import sys
from pathlib import Path

from launch import prepare
from pipelines.errors import DataError
from trainer.cluster.job_options import add_job_options, job_request
from trainer.cluster.prepare_jobs import submit_manifest
from trainer.cluster.submit import find_missing_nodes, format_submission, plan_submission, preview, submit
from trainer.command import command_parser
from trainer.config.variants import sweep_params, variants
from trainer.errors import RunError, UserError
from trainer.tracking.mlflow_tracker import check_tracking
from trainer.tracking.sweep_run import create_sweep_run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--recipe", type=Path, action="append", default=[], help="YAML file; several are a sweep")
    add("--set", action="append", default=[], metavar="section.field=value", help="override; repeatable")
    add("--vary", action="append", default=[], metavar="section.field=v,v", help="of a sweep; repeatable")
    add("--run-dir", type=Path, help="folder of the run, or of the sweep (run.dir/name of the recipe)")
    add_job_options(parser)
    add("--parts", type=int, metavar="N", help="make a manifest in N parts, an array; then merge them")
    add("--array", type=int, metavar="N", help="of a sweep or of parts, at most so many at once (all)")
    add("--after", metavar="JOB", help="wait for the end of this job, in any way")
    add("--chain", type=int, metavar="N", help="N jobs, each continuing the last; none is requeued")
    add("--dry-run", action="store_true", help="print the script, submit and write nothing")
    add("training", nargs="*", metavar="-- ...", help="more for launch/train.py, such as --allow-change NAME")
    return parser.parse_args(arguments)


def main() -> int:
    args = parse()
    made_by = shlex.join(["python", *sys.argv]).replace("\n", " ")
    if args.parts is not None:
        submit_manifest(args, prepare.parse, made_by)
        return 0
    if not args.recipe:
        raise RunError("give --recipe for a training, or --parts for a manifest")
    if args.chain is not None and args.chain < 1:
        raise RunError(f"--chain {args.chain}: at least 1")
    chosen = variants(args.recipe, args.set, args.vary)
    first = chosen[0].recipe
    home = args.run_dir or first.run.dir / (first.name if len(chosen) == 1 else f"{first.name}-sweep")
    for tracking in (variant.recipe.tracking for variant in chosen):
        if tracking.enabled:
            check_tracking(home, uri=tracking.uri, experiment=tracking.experiment)
    request = job_request(args, home.name, requeues=args.chain is None, at_once=args.array)
    planned = plan_submission(
        request, chosen, home=home, extra=args.training, made_by=made_by, needs_data=not args.dry_run
    )
    if args.dry_run:
        print(preview(planned, after=args.after, count=args.chain or 1))
        return 0
    if len(chosen) > 1:
        parent = create_sweep_run(home, first.tracking, sweep_params(chosen))
        planned = plan_submission(
            request, chosen, home=home, extra=args.training, made_by=made_by, parent=parent
        )
    jobs = submit(planned, after=args.after, count=args.chain or 1)
    print(format_submission(planned, jobs))
    if (problem := find_missing_nodes(request)) is not None:
        print(f"note: {problem}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (UserError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
