"""Train a model by a recipe.

    deepspeed launch/train.py --recipe recipes/quickstart.yaml
    python launch/train.py --recipe recipes/quickstart.yaml --set optimisation.epochs=2

Exit codes: 0 done, 2 an error that the message explains, 85 start it again (SIGTERM, SIGUSR1, the time limit,
a hang, a missing rank), 130 saved on request (Ctrl-C, a closed terminal, a file STOP), 1 an internal error.
"""

# DALI's worker processes import this file again: what is heavy is imported inside `main`.
import argparse
import importlib.util
import os
import sys
from pathlib import Path

from trainer.command import command_parser


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--recipe", type=Path, help="YAML file, see recipes/")
    add("--set", action="append", default=[], metavar="section.field=value", help="override; repeatable")
    add("--run-dir", type=Path, help="folder of this run (run.dir/name of the recipe)")
    resume = "auto continues from the newest good checkpoint of the run folder, if there is one (default)"
    add("--resume", default="auto", metavar="auto|never|PATH", help=resume)
    change = "resume although this setting differs from the checkpoint's; repeatable"
    add("--allow-change", action="append", default=[], metavar="NAME", help=change)
    add("--replay", type=Path, metavar="FILE", help="show clips that a run kept in not-finite/ once more")
    add("--check", action="store_true", help="say what the run would do and need, and leave")
    add("--ranks", type=int, help="with --check: as if so many ranks took part")
    # The deepspeed launcher hands it to every process, which finds it in LOCAL_RANK too.
    add("--local_rank", type=int, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    if parsed.recipe is None and parsed.replay is None:
        parser.error("give --recipe, or --replay")
    if parsed.ranks is not None and (not parsed.check or parsed.ranks < 1):
        parser.error("--ranks goes with --check, and is at least 1; the launcher says how many really run")
    return parsed


def main() -> int:
    arguments = parse()
    if importlib.util.find_spec("torch") is None:
        sys.exit("error: PyTorch is missing here; run `make install`, then `source .venv/bin/activate`")
    from models import ModelError
    from pipelines.errors import DataError
    from trainer.config.load import load_recipe
    from trainer.distributed.launchers import print_error
    from trainer.errors import StartAgain, UserError
    from trainer.resilience.signals import REQUEUE

    try:
        if arguments.replay is not None:
            from trainer.resilience.nan_replay import replay

            replay(arguments.replay)
            return 0
        recipe = load_recipe(arguments.recipe, arguments.set)
        run_dir = arguments.run_dir or recipe.run.dir / recipe.name
        if arguments.check:
            from trainer.dry_run import check
            from trainer.monitoring.run_dir import RunDir

            return check(recipe, RunDir(run_dir), arguments.ranks, arguments.resume, arguments.allow_change)
        from trainer.run import train

        return train(recipe, run_dir, arguments.resume, arguments.allow_change)
    except (UserError, DataError, ModelError) as error:
        print_error(error, os.environ)
        return REQUEUE if isinstance(error, StartAgain) else 2


if __name__ == "__main__":
    from trainer.system.process_exit import exit_with

    # While libraries are loaded; from then on a run saves first.
    exit_with(main, interrupted="interrupted before the run began")
