"""Errors of a dataset and of one video."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class DataError(Exception):
    """The user can correct something in the data; the message names what, where and how."""


class VideoError(DataError):
    """One video cannot be used; the message is the reason and continues a sentence: `FILE is empty`."""


def format_unexpected(error: Exception) -> str:
    """The reason for a video over which a library raised an unexpected error."""
    return f"cannot be read: {type(error).__name__}: {error}"


@contextmanager
def unexpected_as_video_error() -> Iterator[None]:
    """Raises VideoError in place of any other exception of the block, as of a library."""
    try:
        yield
    except VideoError:
        raise
    except Exception as error:
        logging.getLogger(__name__).debug("unforeseen error of a library", exc_info=True)
        raise VideoError(format_unexpected(error)) from error
