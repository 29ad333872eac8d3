"""The options of commands that submit jobs to SLURM."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from trainer.cluster.sbatch import JobRequest

JOB = "options of a job"
"""Title of their group."""


def add_job_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `job_request` reads, in a group of their own."""
    add = parser.add_argument_group(JOB).add_argument
    add("--nodes", type=int, default=1, help="(%(default)s)")
    add("--gpus-per-node", type=int, default=8, help="a rank each; 0 computes on CPUs (%(default)s)")
    add("--cpus-per-rank", type=int, default=8, help="cores for it and its workers (%(default)s)")
    add("--time", default="24:00:00", help="limit of an attempt; requeued until done (%(default)s)")
    add("--lead", type=int, default=300, help="seconds before it to signal the run (%(default)s)")
    for name in ("partition", "account", "qos"):
        add(f"--{name}", help=f"SLURM's {name}")
    add("--container", type=Path, metavar="IMAGE", help="Apptainer image, see launch/slurm/container/")
    add("--sbatch", action="append", default=[], metavar="OPTION", help="one more of sbatch's; repeatable")
    add("--no-preflight", action="store_true", help="skip the preflight (launch/doctor.py)")
    add("--min-bandwidth", type=float, metavar="GB/s", help="that the preflight requires")


def parse_with_slurm(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, also: Sequence[str]
) -> argparse.Namespace:
    """The parsed arguments of a command whose options of jobs need --slurm: without it they are refused.

    also: such options beside those of `add_job_options`.
    """
    args = parser.parse_args(arguments)
    job = next(group for group in parser._action_groups if group.title == JOB)
    names = [*also, *(action.dest for action in job._group_actions)]
    given = [name for name in names if getattr(args, name) != parser.get_default(name)]
    if given and not args.slurm:
        parser.error(f"--{given[0].replace('_', '-')} is for jobs: add --slurm")
    return args


def job_request(
    args: argparse.Namespace, name: str, *, requeues: bool = True, at_once: int | None = None
) -> JobRequest:
    """The request that the options describe. Raises RunError for a value that no cluster accepts."""
    named = {option: getattr(args, option) for option in ("partition", "account", "qos")}
    options = [f"--{option}={value}" for option, value in named.items() if value]
    return JobRequest(
        name=name, nodes=args.nodes, gpus_per_node=args.gpus_per_node, cpus_per_rank=args.cpus_per_rank,
        time=args.time, lead=args.lead, container=args.container, options=(*options, *args.sbatch),
        requeues=requeues, preflight=not args.no_preflight, at_once=at_once, min_bandwidth=args.min_bandwidth,
    )  # fmt: skip
