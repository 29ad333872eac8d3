"""Runs a script of `launch/` as a user types it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The finished process of `python launch/NAME`."""
    return subprocess.run(**script_command(name, *arguments), capture_output=True, text=True, timeout=120)


def script_command(name: str, *arguments: object) -> dict[str, Any]:
    """The arguments `args` and `env` of `subprocess` for `python launch/NAME`."""
    return {
        "args": [sys.executable, str(ROOT / "launch" / name), *map(str, arguments)],
        "env": {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"},
    }
