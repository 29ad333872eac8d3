"""DALI's errors: their types, their message, and a worker's DataError behind one."""

import re

from pipelines.errors import DataError

DALI_ERRORS = (RuntimeError, ValueError, IndexError)
"""Types of DALI's own errors, which are C++ exceptions."""

_ASSERTION = re.compile(r'Assert on "[^"]*" failed: (.+)')


def format_dali_error(error: str) -> str:
    """The reason in a message of DALI's, without its places in the code."""
    found = _ASSERTION.search(error)
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    return found[1].strip() if found else lines[0] if lines else "no reason given"


def find_data_error(error: Exception) -> str | None:
    """The message of a worker's DataError for which DALI raised `error`; None where there is none.

    DALI has the exception as the cause, newer versions only its text behind the worker's traceback.
    """
    cause = error.__cause__
    name = f"{DataError.__module__}.{DataError.__qualname__}"
    if isinstance(cause, DataError) or str(error).rstrip().endswith(f"\n{name}: {cause}".rstrip()):
        return str(cause)
    return None
