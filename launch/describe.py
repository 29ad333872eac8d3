"""Describe the cost of models: parameters, operations, activation memory, beside the paper's figures.

    python launch/describe.py k400_b16 recipes/ssv2_l14_32f.yaml
    python launch/describe.py k400_b16 --set model.overrides.fusion=parallel
    python launch/describe.py b16 --form temporal --frames 16 --classes 174 --set local_mhra=1
    python launch/describe.py runs/mine runs/other/checkpoints/step-0001000 weights.safetensors
    python launch/describe.py --published            # all figures of the paper and the released models

GMACs are multiply-accumulates, which the paper calls FLOPs. A step is the forward and backward of the
recipe's global batch, of one clip without a recipe. Exit codes: 0 done, 2 an error that the message explains.
"""

import argparse
import json
import sys
from typing import Any

from models import FORMS, PRESETS
from trainer.command import command_parser, prints_errors
from trainer.errors import RunError
from trainer.system.process_exit import exit_with

_PRESET: dict[str, Any] = {"form": "scene", "frames": 8, "num_classes": 400}
"""Of a preset without these options."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    named = "recipes, presets such as b16, run directories, checkpoints, weights files"
    parser.add_argument("models", nargs="*", metavar="MODEL", help=named)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="repeatable")
    parser.add_argument("--form", choices=FORMS, help="of a preset (scene)")
    parser.add_argument("--frames", type=int, help="of a preset (8)")
    parser.add_argument("--classes", type=int, help="of a preset (400)")
    parser.add_argument("--published", action="store_true", help="all published figures beside ours")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser.parse_args(arguments)


def run(arguments: argparse.Namespace) -> None:
    from trainer.paper.description import (
        describe_named,
        describe_preset,
        published_comparisons,
        published_report,
        report,
        with_distinct_names,
    )
    from trainer.system.terminal import PipeConsole
    from trainer.tracking.comparison.render import print_report

    size = {"form": arguments.form, "frames": arguments.frames, "num_classes": arguments.classes}
    given = [name for name, value in size.items() if value is not None]
    if arguments.published and (arguments.models or arguments.set or given):
        raise RunError("--published is about all published models: give it without models and their fields")
    if given and arguments.models and not PRESETS.keys() & set(arguments.models):
        option = given[0].replace("num_classes", "classes")
        raise RunError(f"--{option} is of presets: of a recipe, give --set model.{given[0]}=VALUE")
    if arguments.published:
        if arguments.json:
            print(json.dumps(published_comparisons(), indent=1))
        else:
            print_report(published_report(), PipeConsole())
        return
    if not arguments.models:
        raise RunError("name a recipe, a preset or a run, or give --published")
    found = []
    for name in arguments.models:
        if name in PRESETS:
            chosen = {**_PRESET, **{field: size[field] for field in given}}
            found.append(describe_preset(name, **chosen, overrides=arguments.set))
        else:
            found.append(describe_named(name, arguments.set))
    found = with_distinct_names(found, arguments.models)
    if arguments.json:
        print(json.dumps([model.as_json() for model in found], indent=1))
    else:
        print_report(report(found), PipeConsole())


@prints_errors
def main() -> int:
    try:
        run(parse())
    except BrokenPipeError:  # as of `| head`
        sys.stderr.close()
    return 0


if __name__ == "__main__":
    exit_with(main, "interrupted")
