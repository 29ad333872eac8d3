"""Prepares published formats and trains one step on each, all in this process.

    python tests/integration/train_formats.py FOLDER NAME ...

FOLDER/NAME/local has the local files of format NAME. Prints a JSON line per format: the exit code
of the training.
"""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launch import prepare
from tests.pipelines.published import FORMATS
from trainer.config.load import load_recipe

RECIPE = Path(__file__).with_name("small.yaml")

# One step and one evaluation of one view; no second process but the loader's.
SETTINGS = [
    "optimisation.steps=1", "optimisation.warmup_steps=0", "optimisation.global_batch=4",
    "evaluation.clips=1", "evaluation.crops=1", "evaluation.batch=4", "augmentation.rand_augment=null",
    "run.keep_best=false",
]  # fmt: skip


def main(folder: Path, names: Sequence[str]) -> None:
    from trainer.run import train

    before = dict(os.environ)
    for name in names:
        os.environ.clear()  # the process group's address is in it
        os.environ.update(before)
        published, work = FORMATS[name], folder / name
        manifests = {}
        for split in ("train", "val"):
            val = split == "val" and published.val is not None
            out = manifests[split] = work / f"{'val' if val else 'train'}.arrow"
            prepare.run([*published.arguments(work / "local", val=val), "--out", str(out)])
        data = [f"data.{split}={path}" for split, path in manifests.items()]
        code = train(load_recipe(RECIPE, [*SETTINGS, *data]), work / "run")
        print("\n" + json.dumps({"format": name, "code": code}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
