"""How a process that may be one of many ends."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from trainer.system.secrets import redacted
from trainer.system.timeouts import has_hung_threads


def exit_on_sigterm(then: str) -> None:
    """Have SIGTERM end this process as `sys.exit` does, with 143, so that what is half done is removed.

    then: what its user can do next, for the message.
    """

    def end(*_: object) -> None:
        print(f"ended by SIGTERM; {then}", file=sys.stderr)
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)


def exit_with(main: Callable[[], int], interrupted: str) -> NoReturn:
    """End the process with what `main` returns, 130 where Ctrl-C came, or 1 and the traceback of a defect.

    It ends at once where Python's own end would wait: for the other ranks, where this one failed alone and
    they are at work in a collective, or for work that hangs. interrupted: what to say after Ctrl-C.
    """
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
        with suppress(OSError):  # its reader may have ended by the same interrupt
            print(interrupted, file=sys.stderr)
    except Exception:
        code = 1
        with suppress(OSError):
            text = traceback.format_exc()
            if (safe := redacted(text)) != text:
                print(safe, end="", file=sys.stderr)
            else:
                sys.excepthook(*sys.exc_info())  # torch's says of which rank
    distributed = sys.modules.get("torch.distributed")  # not imported to say that a recipe has a mistake
    if has_hung_threads() or (distributed is not None and distributed.is_initialized()):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code)
    sys.exit(code)
