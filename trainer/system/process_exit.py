"""Exit of a process that may be one of several ranks."""

import gc
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from trainer.secrets import redacted
from trainer.system.timeouts import has_hung_threads


def exit_on_sigterm(then: str) -> None:
    """On SIGTERM, exit with 143 by `sys.exit`, so that partial files are removed.

    then: what the user can do next, for the message.
    """

    def end(*_: object) -> None:
        print(f"ended by SIGTERM; {then}", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)


def exit_with(main: Callable[[], int], interrupted: str) -> NoReturn:
    """Exit with the result of `main`, with 130 after Ctrl-C, or with 1 and a traceback after an exception.

    The process ends at once where Python's shutdown would wait: for other ranks in a collective, or for a
    hanging thread. interrupted: the message after Ctrl-C.
    """
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
        with suppress(OSError):  # the reader of a pipe may have ended by the same Ctrl-C
            print(interrupted, file=sys.stderr)
    except Exception:
        code = 1
        with suppress(OSError):
            text = traceback.format_exc()
            if (safe := redacted(text)) != text:
                print(safe, end="", file=sys.stderr)
            else:
                sys.excepthook(*sys.exc_info())  # torch's hook prints the rank
    distributed = sys.modules.get("torch.distributed")  # not imported for a mistake in a recipe
    if has_hung_threads() or (distributed is not None and distributed.is_initialized()):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)
    # Python's shutdown collects garbage several times, which takes seconds with the objects of PyTorch and
    # MLflow. Frozen objects are left out.
    gc.freeze()
    sys.exit(code)
