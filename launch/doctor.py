"""Check the machines before a run: GPUs, memory, disks, versions, the shared folder and an all-reduce.

    python launch/doctor.py
    srun python launch/doctor.py --folder runs/quickstart --recipe recipes/quickstart.yaml

On a cluster, start one process per rank, as for the training. Exit codes: 0 nothing failed, 1 a check failed
(FOLDER/slurm/preflight.json names the nodes), 2 a mistake in the command or the recipe.
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path

from trainer.command import command_parser, prints_errors


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    folder = "run directory, on a file system of all nodes (the recipe's; without one: runs)"
    add("--folder", "--run-dir", type=Path, help=folder)
    add("--recipe", type=Path, help="check its manifests, and disk space for its checkpoints")
    override = "override one field of the recipe; repeatable"
    add("--set", action="append", default=[], metavar="section.field=value", help=override)
    add("--gpus-per-node", type=int, metavar="N", help="required (one per rank)")
    add("--min-bandwidth", type=float, metavar="GB/s", help="required bus bandwidth of the all-reduce")
    add("--patience", type=float, default=5.0, metavar="MINUTES", help="to wait for all ranks (%(default)s)")
    # A job's script passes the arguments of the training, and the deepspeed launcher a rank.
    for name, action in (("--resume", "store"), ("--allow-change", "append"), ("--local_rank", "store")):
        add(name, action=action, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    if parsed.set and parsed.recipe is None:
        parser.error("--set needs --recipe")
    for name in ("gpus_per_node", "min_bandwidth", "patience"):
        value = getattr(parsed, name)
        if value is not None and value < 0:
            parser.error(f"--{name.replace('_', '-')} must not be negative, but is {value:g}")
    if parsed.patience == 0:
        parser.error("--patience must be above 0")
    return parsed


@prints_errors
def main() -> int:
    arguments = parse()
    if importlib.util.find_spec("torch") is None:
        print(
            "error: PyTorch is missing here; run `make install`, then `source .venv/bin/activate`",
            file=sys.stderr,
        )
        return 2
    # The table reports ranks that do not answer; torch would log every poll.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from trainer.cluster.preflight.runner import PreflightRequest, preflight

    return preflight(
        PreflightRequest(
            folder=arguments.folder,
            recipe=arguments.recipe,
            overrides=arguments.set,
            gpus_per_node=arguments.gpus_per_node,
            min_bandwidth=arguments.min_bandwidth,
            patience=arguments.patience,
        )
    )


if __name__ == "__main__":
    from trainer.system.process_exit import exit_with

    exit_with(main, interrupted="interrupted")
