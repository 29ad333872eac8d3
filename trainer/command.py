"""What the commands of `launch/` have in common. It imports neither torch nor DALI, which takes seconds."""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

from models import ModelError
from pipelines.errors import DataError
from trainer.errors import StartAgain, UserError
from trainer.resilience.signals import REQUEUE

STARTED_BY = "UNIFORMERV2_STARTED_BY"
"""Environment variable that `launch/cli.py` sets to the program's name, `uniformerv2`."""

_OPTION = re.compile(r"-[A-Za-z]|--[A-Za-z][^\s=]*")


class CommandParser(argparse.ArgumentParser):
    """Names an unknown option, and a similar one that exists, before any other mistake; also a similar job or
    choice.

    argparse would first report a required option as missing, whose name the unknown one may misspell.
    """

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        given = list(sys.argv[1:] if args is None else args)
        for option in self._options(given):
            known = list(self._option_string_actions)
            if not any(name.startswith(option) for name in known):
                words = [name[2:] for name in known if len(name) > 2]  # the dashes would count as similar
                near = difflib.get_close_matches(option.lstrip("-"), words, n=1)
                hint = f"did you mean --{near[0]}?" if near else "--help lists the options"
                self.error(f"unknown option {option}; {hint}")
        return super().parse_known_args(given, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            near = difflib.get_close_matches(str(value)[:100], list(map(str, action.choices or ())), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise argparse.ArgumentError(action, f"{error.message}{hint}") from None

    def _options(self, arguments: Sequence[str]) -> Iterator[str]:
        """The names of the options among the arguments of this parser, without those of its jobs."""
        for argument in arguments:
            if argument == "--" or (self._subparsers is not None and not argument.startswith("-")):
                return
            name = argument.partition("=")[0] if argument.startswith("--") else argument[:2]
            if _OPTION.fullmatch(name) and (" " not in argument or "=" in argument):
                yield name


def command_parser(about: str | None) -> CommandParser:
    """A parser whose help begins with `about`, the lines as they are."""
    program = os.environ.get(STARTED_BY)
    name = f"{program} {Path(sys.argv[0]).stem.replace('_', '-')}" if program else None
    return CommandParser(name, description=about, formatter_class=argparse.RawDescriptionHelpFormatter)


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
