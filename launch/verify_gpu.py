"""Verify a GPU machine, and measure its speed.

    python launch/verify_gpu.py
    python launch/verify_gpu.py --only decoder --only model --seconds 120
    python launch/verify_gpu.py --device cpu

Each step runs in its own process. After each, results.json and results.md in the folder --out are rewritten;
results.md is a table for docs/performance.md. Exit codes: 0 all passed, 1 a step failed or was not run, 2 a
mistake in the command, 130 interrupted (results so far are written).
"""

import argparse
from pathlib import Path

from trainer.command import command_parser
from trainer.system.process_exit import exit_with
from trainer.verification.steps import STEPS

SECONDS = {"cuda": 480.0, "cpu": 600.0}


def parse() -> argparse.Namespace:
    names = ", ".join(step.name for step in STEPS)
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--only", action="append", metavar="STEP", help=f"repeatable; one of: {names}")
    add("--skip", action="append", default=[], metavar="STEP", help="repeatable")
    add("--seconds", type=float, help=f"for all steps ({SECONDS['cuda']:g}; on a CPU {SECONDS['cpu']:g})")
    device = "the first GPU of CUDA_VISIBLE_DEVICES, or the CPU for a trial (%(default)s)"
    add("--device", choices=("cuda", "cpu"), default="cuda", help=device)
    add("--out", type=Path, default=Path("runs/verification"), help="(%(default)s)")
    add("--list", action="store_true", help="list the steps and end")
    args = parser.parse_args()
    for name in [*(args.only or []), *args.skip]:
        if name not in {step.name for step in STEPS}:
            parser.error(f"there is no step {name!r}; there are: {names}")
    if args.seconds is None:
        args.seconds = SECONDS[args.device]
    if args.seconds <= 0:
        parser.error(f"--seconds must be above 0, not {args.seconds:g}")
    if not args.list and args.device == "cuda":
        import torch  # seconds, so only where needed

        if not torch.cuda.is_available():
            parser.error("torch sees no GPU here; --device cpu runs without one")
    return args


def main() -> int:
    args = parse()
    if args.list:
        for step in STEPS:
            print(f"{step.name:10} {step.about}{' (needs a GPU)' if step.needs_gpu else ''}")
        return 0
    from trainer.verification.runner import run_steps

    chosen = [
        step for step in STEPS if step.name in (args.only or [step.name]) and step.name not in args.skip
    ]
    results = run_steps(
        chosen,
        device="cuda:0" if args.device == "cuda" else "cpu",
        folder=args.out.absolute(),
        seconds=args.seconds,
        announce=print_line,
    )
    print((args.out / "results.md").read_text(encoding="utf-8"))
    print(f"wrote results.json and results.md to {args.out}")
    return 1 if any(result.status in ("failed", "not run") for result in results) else 0


def print_line(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    exit_with(main, "interrupted; the folder of --out has the results of the steps that ran")
