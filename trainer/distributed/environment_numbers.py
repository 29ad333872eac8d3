"""Numbers in environment variables."""

from collections.abc import Mapping

from trainer.errors import RunError


def read_number(variables: Mapping[str, str], name: str, least: int = 0) -> int:
    """The value of a variable that is set. Raises RunError unless it is a whole number, at least `least`."""
    text = variables[name].strip()
    # Not int() alone: it takes `1_0`, and digits of other scripts.
    if not (text.isascii() and text.isdigit() and len(text) < 19) or int(text) < least:
        raise RunError(f"{name} is {variables[name]!r}; allowed: a whole number, at least {least}")
    return int(text)
