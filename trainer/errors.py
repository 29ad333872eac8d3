"""Errors that a user can repair."""

from trainer.secrets import redacted


class UserError(Exception):
    """An error that the user can repair; the message says what is wrong, where, and what to do.

    Passwords in quoted addresses are redacted.
    """

    def __str__(self) -> str:
        return redacted(super().__str__())


class RecipeError(UserError):
    """The recipe, or an override of one of its fields, is wrong."""


class RunError(UserError):
    """The run cannot start or continue."""


class AgreedError(RunError):
    """An error of some rank, raised on all ranks with the same message; one of them prints it."""


class StartAgain(RunError):
    """An error that may not recur when the same command is given again: a missing node, a lost connection."""
