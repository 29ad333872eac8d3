"""Errors that a user can mend, and how they reach the user."""

from trainer.system.secrets import redacted


class UserError(Exception):
    """A mistake its maker can mend; the message says what was wrong, where, and what to do.

    A password that a quoted address holds is not shown.
    """

    def __str__(self) -> str:
        return redacted(super().__str__())


class RecipeError(UserError):
    """The recipe, or an override of one of its fields, is wrong."""


class RunError(UserError):
    """The run cannot start or go on."""


class AgreedError(RunError):
    """What some rank could not do, raised on all ranks with the same words: one of them is to show it."""


class StartAgain(RunError):
    """What may go well the next time as it is: a node that did not come, a connection that was lost."""
