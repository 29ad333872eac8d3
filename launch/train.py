"""Train a model as a recipe says.

    deepspeed launch/train.py --recipe recipes/quickstart.yaml
    python launch/train.py --recipe recipes/quickstart.yaml --set optimisation.epochs=2

Exit codes: 0 done, 2 a mistake in what was asked (the message says which), 85 saved and to be started again
(SIGTERM, SIGUSR1), 130 saved after Ctrl-C.
"""

# DALI's worker processes import this file again: what is heavy is imported inside `main`.
import argparse
import os
import sys
from pathlib import Path


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--recipe", type=Path, required=True, help="YAML file, see recipes/")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="section.field=value",
        help="override one field; repeatable",
    )
    parser.add_argument(
        "--run-dir", type=Path, help="folder of this run (default: run.dir/name of the recipe)"
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto continues from the newest good checkpoint of the run folder, if there is one (default)",
    )
    parser.add_argument("--check", action="store_true", help="say what the run would do and need, and leave")
    parser.add_argument("--ranks", type=int, help="with --check: as if so many ranks took part")
    # The deepspeed launcher hands it to every process, which finds it in LOCAL_RANK too.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> int:
    arguments = parse()
    from models import ModelError
    from pipelines import DataError
    from trainer import UserError
    from trainer.recipe_file import load_recipe

    try:
        recipe = load_recipe(arguments.recipe, arguments.set)
        if arguments.check:
            from trainer.check import check

            return check(recipe, ranks=arguments.ranks)
        from trainer.run import train

        return train(recipe, arguments.run_dir or recipe.run.dir / recipe.name, arguments.resume)
    except (UserError, DataError, ModelError) as error:
        # All ranks meet the same mistake; one message is enough.
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
