"""Evaluate a trained model on a manifest: accuracy, calibration, scores per video.

    python launch/evaluate.py runs/quickstart
    deepspeed launch/evaluate.py runs/quickstart --manifest data/test.arrow --clips 4 --crops 3
    python launch/evaluate.py weights.safetensors --out results/weights --json

The same command continues an interrupted evaluation, with any number of ranks.

Exit codes: 0 done, 2 an error that the message explains, 85 to be started again (SIGTERM, SIGUSR1, the end of
the job, a missing rank), 130 interrupted (Ctrl-C), 1 an internal error.
"""

# DALI's worker processes import this file again: heavy imports are inside `main`.
import argparse
import os
from pathlib import Path

from trainer.command import command_parser


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("source", type=Path, help="a run directory, a checkpoint, or a file of weights")
    add("--last", action="store_true", help="of a run, the last weights, not those of the best evaluation")
    add("--manifest", type=Path, metavar="FILE", help="the videos (the recipe's data.val)")
    add("--clips", type=_count, metavar="N", help="clips per video (as in the run's evaluation)")
    add("--crops", type=int, choices=(1, 3), help="crops per clip (as in the run's evaluation)")
    add("--batch", type=_count, metavar="N", help="videos per rank and batch (as in the run)")
    add("--workers", type=_count, metavar="N", help="processes per rank that read and decode (automatic)")
    add("--decoder", choices=("auto", "dali", "pyav", "hybrid"), help="decoder (as in the run)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="device for the model (auto)")
    add("--precision", choices=("auto", "bf16", "autocast", "fp32"), help="of the model (as in the run)")
    add("--bad-share", type=_share, metavar="S", help="stop if a larger share of the videos is unreadable")
    add("--frames", type=_count, metavar="N", help="frames per clip, for a released checkpoint")
    add("--classes", type=Path, metavar="FILE", help="class names of the model, one per line")
    add("--out", type=Path, metavar="DIR", help="folder for the results (evaluations/... in the run)")
    add("--again", action="store_true", help="delete an earlier evaluation in the output folder")
    add("--json", action="store_true", help="print the result as JSON on standard output")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_args(arguments)


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 4096:
        raise argparse.ArgumentTypeError(f"{text} is not between 1 and 4096")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def main() -> int:
    arguments = parse()
    from models import ModelError
    from pipelines.errors import DataError
    from trainer.distributed.launchers import print_error
    from trainer.errors import StartAgain, UserError
    from trainer.evaluation.evaluator import evaluate
    from trainer.evaluation.target import EvaluationRequest
    from trainer.resilience.signals import REQUEUE

    given = vars(arguments)
    request = EvaluationRequest(
        class_names=given["classes"],
        **{
            name: given[name]
            for name in (
                "source", "last", "manifest", "clips", "crops", "batch", "workers", "decoder", "precision",
                "bad_share", "frames", "out", "again",
            )
        },
    )  # fmt: skip
    try:
        return evaluate(request, arguments.device, as_json=arguments.json)
    except (UserError, DataError, ModelError) as error:
        print_error(error, os.environ)
        return REQUEUE if isinstance(error, StartAgain) else 2


if __name__ == "__main__":
    from trainer.system.process_exit import exit_with

    exit_with(main, interrupted="interrupted before the evaluation began")
