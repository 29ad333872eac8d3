"""Types of command line arguments, with a message for a wrong value."""

from argparse import ArgumentTypeError
from collections.abc import Callable
from math import inf, isfinite


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
