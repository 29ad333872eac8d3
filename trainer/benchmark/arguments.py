"""Arguments that several jobs of `bench.py` have."""

import argparse
from pathlib import Path

from trainer.errors import RunError


def add_common(job: argparse.ArgumentParser) -> None:
    job.add_argument("--out", type=Path, default=Path("runs/bench"), help="for all files (%(default)s)")


def add_device(job: argparse.ArgumentParser) -> None:
    job.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU where there is one"
    )


def resolve_device(wanted: str) -> str:
    """`cpu` or `cuda`. Raises RunError for `cuda` without a GPU."""
    import torch

    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise RunError("--device cuda: PyTorch finds no GPU here; use --device cpu")
    return "cuda" if available and wanted != "cpu" else "cpu"


def check_positive(job: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program with a message for a number that is not above 0."""
    for name, value in vars(args).items():
        values = value if isinstance(value, list) else [value]
        for each in values:
            if isinstance(each, int | float) and not isinstance(each, bool) and each <= 0:
                job.error(f"--{name.replace('_', '-')} must be above 0, not {each:g}")
