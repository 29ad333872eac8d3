"""What the commands of `launch/` have in common. It imports neither torch nor DALI, which takes seconds."""

import argparse
import sys
from collections.abc import Callable
from functools import wraps

from models import ModelError
from pipelines.errors import DataError
from trainer.errors import StartAgain, UserError
from trainer.resilience.signals import REQUEUE


def command_parser(about: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with `about`, the lines as they are."""
    return argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)


def prints_errors(main: Callable[[], int]) -> Callable[[], int]:
    """`main`, but an error that the user can repair is printed, with exit code 2, or 85 for `StartAgain`."""

    @wraps(main)
    def printing() -> int:
        try:
            return main()
        except (UserError, DataError, ModelError) as error:
            print(f"error: {error}", file=sys.stderr)
            return REQUEUE if isinstance(error, StartAgain) else 2

    return printing
