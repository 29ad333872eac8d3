"""Losses of 20 training steps that a CPU computed in fp32 at ZeRO stage 0: data/carried_losses.json.

`python -m tests.trainer.engine.carried_losses` computes them again, which hides what has changed since.
"""

import json
from pathlib import Path

from tests.trainer.checkpoint.training import make_engine, train
from tests.trainer.ranks import Ranks

FILE = Path(__file__).parent / "data" / "carried_losses.json"
FORMS = ("scene", "temporal")
STEPS = 20


def losses(form: str, stage: int = 0, precision: str = "fp32", **engine: object) -> list[float]:
    """The loss of each step on this rank's engine. engine: fields of the recipe's section."""
    return train(make_engine(stage, precision=precision, form=form, **engine), 0, STEPS)  # type: ignore[arg-type]


def carried(form: str) -> list[float]:
    found: list[float] = json.loads(FILE.read_text(encoding="utf-8"))[form]
    return found


def main() -> None:
    with Ranks(1) as rank:
        FILE.write_text(json.dumps({form: rank.run(losses, form)[0] for form in FORMS}, indent=1) + "\n")


if __name__ == "__main__":
    main()
