"""Errors of a dataset and of one video."""


class DataError(Exception):
    """The user can correct something in the data; the message names what, where and how."""


class VideoError(DataError):
    """One video cannot be used; the message is the reason and continues a sentence: `FILE is empty`."""


def format_unexpected(error: Exception) -> str:
    """The reason for a video over which a library raised an unexpected error."""
    return f"cannot be read: {type(error).__name__}: {error}"
