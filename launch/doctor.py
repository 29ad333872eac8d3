"""Look at the machines before a run: GPUs, memory, disks, clocks, the shared folder and what lies between.

    python launch/doctor.py
    srun python launch/doctor.py --folder runs/quickstart --recipe recipes/quickstart.yaml

On a cluster, start one process per rank, as for the training. Exit codes: 0 nothing failed, 1 something did
(the table says what, FOLDER/slurm/preflight.json on which nodes), 2 a mistake in the command or the recipe.
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", "--run-dir", type=Path, help="of the run, seen by all nodes (the recipe's; or else: runs)"
    )
    parser.add_argument("--recipe", type=Path, help="whose manifests must be there, and checkpoints fit")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="section.field=value",
        help="override one field of the recipe; repeatable",
    )
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="that must be there (one per rank)")
    parser.add_argument(
        "--min-bandwidth", type=float, metavar="GB/s", help="of the bus in an all-reduce; less is a failure"
    )
    parser.add_argument(
        "--patience", type=float, default=5.0, metavar="MINUTES", help="to wait for all ranks (%(default)s)"
    )
    # A job's script hands the training's arguments on, and the deepspeed launcher a rank to every process.
    for name, action in (("--resume", "store"), ("--allow-change", "append"), ("--local_rank", "store")):
        parser.add_argument(name, action=action, help=argparse.SUPPRESS)
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


def main() -> int:
    arguments = parse()
    if importlib.util.find_spec("torch") is None:
        print(
            "error: PyTorch is missing here; run `make install`, then `source .venv/bin/activate`",
            file=sys.stderr,
        )
        return 2
    # Whoever does not answer in time has a row in the table; torch would tell of every poll.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from models import ModelError
    from pipelines.errors import DataError
    from trainer.cluster.preflight.runner import PreflightRequest, preflight
    from trainer.errors import UserError

    try:
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
    except (UserError, DataError, ModelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    from trainer.system.process_exit import exit_with

    exit_with(main, interrupted="interrupted")
