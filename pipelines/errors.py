"""Errors of the data, and of one video."""


class DataError(Exception):
    """Something about the data that its owner can mend; the message says what, where and how."""


class VideoError(DataError):
    """One video cannot be used; the message says why, in words that follow the file's name."""


def format_unexpected(error: Exception) -> str:
    """A reason for a video over which a library raised what nobody thought of."""
    return f"cannot be read: {type(error).__name__}: {error}"
