"""Exit of a process that may be one of several ranks."""

import errno
import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import NoReturn

from pipelines.formatting import printable
from trainer.secrets import redacted
from trainer.system.timeouts import has_hung_threads

_OF_A_PATH = {
    errno.EACCES,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.EPERM,
    errno.EROFS,
}
"""Errors of a path that is unusable as the user gave it, or of its permissions."""


def exit_on_sigterm(then: str) -> None:
    """On SIGTERM, exit with 143 by `sys.exit`, so that partial files are removed.

    During an import the process ends at once, and partial files stay: callbacks of the import lock, and some
    libraries, ignore exceptions. then: what the user can do next, for the message.
    """

    def end(_: int, frame: FrameType | None) -> None:
        # The reader of the pipe may have ended, or the signal may have interrupted a write.
        with suppress(OSError, RuntimeError):
            print(f"ended by SIGTERM; {then}", file=sys.stderr, flush=True)
        while frame is not None:
            if frame.f_code.co_filename.startswith("<frozen importlib"):
                os._exit(128 + signal.SIGTERM)
            frame = frame.f_back
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)


def exit_with(main: Callable[[], int], interrupted: str) -> NoReturn:
    """Exit with the result of `main`, with 130 after Ctrl-C, or with 1 and a traceback after an exception.

    A path that is too long or that the user may not read or write is a message, with 2. In a rank it is a
    failure, with 1: another node may be able to use it.
    The process ends at once where Python's shutdown would wait: for other ranks in a collective, or for a
    hanging thread. interrupted: the message after Ctrl-C.
    """
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
        with suppress(OSError):  # the reader of a pipe may have ended by the same Ctrl-C
            print(interrupted, file=sys.stderr)
    except Exception as error:
        path = None if _is_rank() else unusable_path(error)
        code = 1 if path is None else 2
        with suppress(OSError):
            text = traceback.format_exc()
            if path is not None:
                print(f"error: {path}", file=sys.stderr)
            elif (safe := redacted(text)) != text:
                print(safe, end="", file=sys.stderr)
            else:
                sys.excepthook(*sys.exc_info())  # torch's hook prints the rank
    if has_hung_threads() or _is_rank():
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)
    # Python's shutdown collects garbage several times, which takes seconds with the objects of PyTorch and
    # MLflow. Frozen objects are left out.
    gc.freeze()
    sys.exit(code)


def unusable_path(error: Exception) -> str | None:
    """The message, if the error is that of a path that the user gave or of its permissions."""
    if not isinstance(error, OSError) or error.errno not in _OF_A_PATH:
        return None
    return format_os_error(error) if isinstance(error.filename, (str, bytes)) else None


def format_os_error(error: OSError) -> str:
    """The message of an error, without secrets: the path, or both of a rename, what is wrong, what to do."""
    paths = [name for name in (error.filename, error.filename2) if isinstance(name, (str, bytes))]
    text = str(error.strerror or error)
    if paths:
        text = f"{' -> '.join(printable(os.fsdecode(path)) for path in paths)}: {text}"
    if paths and error.errno in {*_OF_A_PATH, errno.ENOENT}:
        text += "; check the path and the permissions"
    return redacted(text)


def _is_rank() -> bool:
    """Whether this process is connected with others."""
    distributed = sys.modules.get("torch.distributed")  # not imported for a mistake in a recipe
    return distributed is not None and bool(distributed.is_initialized())
