"""Types of command line arguments, with a message for a wrong value."""

from argparse import ArgumentTypeError
from collections.abc import Callable
from math import inf, isfinite
from pathlib import Path


def integer(least: int, most: float = inf) -> Callable[[str], int]:
    """The type of a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            limits = f"of {least} or more" if most == inf else f"from {least} to {most}"
            raise ArgumentTypeError(f"'{text}' is no whole number {limits}")
        return value

    return parse


def number(least: float, most: float = inf) -> Callable[[str], float]:
    """The type of a number from `least` to `most`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = inf
        if not (isfinite(value) and least <= value <= most):
            limits = f"{least:g} or more" if most == inf else f"{least:g} to {most:g}"
            raise ArgumentTypeError(f"'{text}' is no number of {limits}")
        return value

    return parse


def file_named(suffix: str) -> Callable[[str], Path]:
    """The type of a file to write whose name ends in `suffix`, so that no other file is replaced."""

    def parse(text: str) -> Path:
        if not text.lower().endswith(suffix) or Path(text).is_dir():
            raise ArgumentTypeError(f"'{text}' is no name of a {suffix} file")
        return Path(text)

    return parse


def output_folder(text: str) -> Path:
    """The type of a folder for results, which is made if it does not exist."""
    path = Path(text)
    existing = next((each for each in (path, *path.parents) if each.exists()), path)
    if not existing.is_dir():
        raise ArgumentTypeError(f"'{text}': {existing} is no folder")
    return path
