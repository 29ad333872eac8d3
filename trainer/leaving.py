"""How a process that may be one of many ends."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from trainer.deadline import stuck


def end_with(main: Callable[[], int], interrupted: str) -> NoReturn:
    """End the process with what `main` returns, 130 where Ctrl-C came, or 1 and the traceback of a defect.

    It ends at once where Python's own end would wait: for the other ranks, where this one failed alone and
    they are at work in a collective, or for work that hangs. interrupted: what to say after Ctrl-C.
    """
    try:
        code = main()
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        code = 130
    except Exception:
        traceback.print_exc()
        code = 1
    distributed = sys.modules.get("torch.distributed")  # not imported to say that a recipe has a mistake
    if stuck() or (distributed is not None and distributed.is_initialized()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
