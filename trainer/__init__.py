"""Turns a recipe into a run: engine, loop, checkpoints, evaluation, tracking."""


class UserError(Exception):
    """A mistake its maker can mend; the message says what was wrong, where, and what to do."""


class RecipeError(UserError):
    """The recipe, or an override of one of its fields, is wrong."""


class RunError(UserError):
    """The run cannot start or go on."""


class StartAgain(RunError):
    """What may go well the next time as it is: a node that did not come, a connection that was lost."""
