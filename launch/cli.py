"""The command `uniformerv2`: runs the scripts of this folder.

    uniformerv2 train --recipe quickstart
    uniformerv2 prepare folder VIDEOS --out data/train.arrow
    uniformerv2 COMMAND --help

Each script is a command. The process executes the script (`exec`), so signals and exit codes are the script's
own. Exit code of this file: 2 for an unknown command.
"""

import ast
import difflib
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

LAUNCH = Path(__file__).resolve().parent
_LAUNCHED = {"train", "evaluate"}  # commands with one process per GPU
_NO_COMMANDS = {"__init__", "cli", "turn"}  # the last is for a SLURM job's script
# Set in every rank by the deepspeed launcher, torchrun, srun and the MPI launchers.
_RANK_VARIABLES = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK")
_HELP = {"-h", "--help"}
_STARTS_NO_RUN = {"--check", "--replay", *_HELP}


def commands() -> dict[str, Path]:
    """The script of each command: `verify-gpu` is verify_gpu.py."""
    scripts = [*LAUNCH.glob("*.py"), *LAUNCH.glob("slurm/*.py")]
    named = {path.stem.replace("_", "-"): path for path in scripts if path.stem not in _NO_COMMANDS}
    return dict(sorted(named.items()))


def about(script: Path) -> str:
    """The first paragraph of a script's docstring, without a command after a colon."""
    text = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split()).partition(": `python")[0].rstrip(".")


def command_line(name: str, arguments: list[str]) -> list[str]:
    """The command line for a command: its script, started by deepspeed if this node has several GPUs."""
    script = [str(commands()[name]), *arguments]
    if name in _LAUNCHED and _needs_launcher(arguments):
        launcher = Path(sys.executable).with_name("deepspeed")
        if launcher.is_file():
            return [sys.executable, str(launcher), "--quiet", *script]
        print(f"note: {launcher} does not exist: one GPU is used", file=sys.stderr)
    return [sys.executable, *script]


def _needs_launcher(arguments: list[str]) -> bool:
    if _STARTS_NO_RUN.intersection(arguments) or any(name in os.environ for name in _RANK_VARIABLES):
        return False
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([gpu for gpu in chosen.split(",") if gpu.strip()]) > 1
    return len(list(Path("/dev").glob("nvidia[0-9]*"))) > 1  # counted without PyTorch, which takes seconds


def main(arguments: list[str] | None = None) -> NoReturn:
    """Execute the script that the first argument names."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    known = commands()
    if name in ("-h", "--help"):
        width = max(map(len, known))
        lines = [f"  {command:{width}}  {about(script)}" for command, script in known.items()]
        print("usage: uniformerv2 COMMAND ...\n", *lines, "\nFor more: uniformerv2 COMMAND --help", sep="\n")
        sys.exit(0)
    if name == "--version":
        print(f"uniformerv2-trainer {version('uniformerv2-trainer')}")
        sys.exit(0)
    if name not in known:
        near = difflib.get_close_matches(name[:100], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are: {', '.join(known)}"
        print(f"error: unknown command {name[:100]!r}; {hint}", file=sys.stderr)
        sys.exit(2)
    if _HELP.intersection(rest):  # in this process, so that the usage names the command and not the script
        sys.argv = [f"uniformerv2 {name}", *rest]
        code = compile(known[name].read_text(encoding="utf-8"), str(known[name]), "exec")
        exec(code, {"__name__": "__main__", "__file__": str(known[name])})
        sys.exit(0)
    command = command_line(name, rest)
    os.environ["UNIFORMERV2_STARTED_BY"] = "uniformerv2"  # see `command_parser`
    sys.stdout.flush()
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
