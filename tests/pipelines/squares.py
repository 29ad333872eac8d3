"""Functions for processes that tests start, apart from the imports of a test's file."""

import os
import signal

DEADLY = {7, 40, 41, 99}
LATE = {100, 150, 640}


def square(number: int) -> int:
    return number * number


def square_or_die(number: int) -> int:
    if number in DEADLY:
        os.kill(os.getpid(), signal.SIGSEGV)
    return number * number


def square_or_die_late(number: int) -> int:
    if number in LATE:
        os.kill(os.getpid(), signal.SIGSEGV)
    return number * number


class Refused(Exception):
    """Its pickle cannot be read: its own arguments are not those of its text."""

    def __init__(self, number: int, why: str) -> None:
        super().__init__(f"{number} {why}")


def refuse(number: int) -> int:
    raise Refused(number, "is refused")
