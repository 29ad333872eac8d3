"""Arguments that several jobs of `bench.py` have."""

import argparse
from pathlib import Path

from pipelines.arguments import number, output_folder
from pipelines.dataset.paths import check_writable
from pipelines.formatting import printable
from trainer.benchmark.child import TIMEOUT
from trainer.errors import RunError

positive = number(1e-3)
"""The type of a duration or rate."""


def add_common(job: argparse.ArgumentParser, name: str) -> None:
    """name: of the job; each has a folder of its own for its results."""
    where = Path("runs/bench", name)
    job.add_argument("--out", type=output_folder, default=where, help="folder for the results (%(default)s)")


def add_recipe(job: argparse.ArgumentParser, default: str, purpose: str) -> None:
    """purpose: what the job does with the recipe."""
    job.add_argument("--recipe", type=Path, default=Path(default), help=f"recipe to {purpose} (%(default)s)")
    changed = "change a field of the recipe; repeatable"
    job.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help=changed)


def check_output(folder: Path) -> None:
    """Raises RunError if no results can be written to a folder, before they are measured."""
    try:
        check_writable(folder)
    except OSError as error:
        place = printable(Path(error.filename))
        raise RunError(f"--out {printable(folder)}: {place} cannot be written: {error.strerror}") from error


def add_timeout(job: argparse.ArgumentParser) -> None:
    job.add_argument(
        "--timeout",
        type=positive,
        default=TIMEOUT,
        metavar="SECONDS",
        help="give a measurement up after so many seconds (%(default)g)",
    )


def add_device(job: argparse.ArgumentParser) -> None:
    job.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="device to measure; auto: a GPU where there is one",
    )


def resolve_device(wanted: str) -> str:
    """`cpu` or `cuda`. Raises RunError for `cuda` without a GPU."""
    import torch

    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise RunError("--device cuda: PyTorch finds no GPU here; use --device cpu")
    return "cuda" if available and wanted != "cpu" else "cpu"
