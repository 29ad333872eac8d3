"""Recreate the clips of a training step and compare their hash with the recorded one.

    python launch/replay_batch.py runs/quickstart --step 120
    python launch/replay_batch.py runs/l14 --step 40000 --clips 32 --device cuda --json
    python launch/replay_batch.py copied/run --step 7 --train here/train.arrow

The training loader makes the clips with their augmentation from the run's recipe, manifests and seed, in one
process for any world size of the run. The contact sheet has a row for each clip. Exit codes: 0 the hashes are
equal, or none was recorded; 2 they differ, or another error that the message explains; 130 interrupted.
"""

# DALI's worker processes import this file again: heavy imports are inside `main`.
import argparse
import json
import sys
from contextlib import ExitStack, redirect_stdout
from pathlib import Path

from pipelines.formatting import printable
from trainer.command import command_parser, prints_errors
from trainer.system.process_exit import exit_with


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("run", type=Path, help="a run directory")
    add("--step", type=int, required=True, help="from 1, as in the run's messages")
    add("--out", type=Path, help="the contact sheet, a PNG (step-N.png)")
    add("--clips", type=int, default=16, help="number of clips to draw; all are hashed (%(default)s)")
    add("--frames", type=int, default=8, help="frames to draw per clip, at most (%(default)s)")
    add(
        "--train", type=Path, nargs="+", default=[], metavar="MANIFEST", help="present paths of the manifests"
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(%(default)s)")
    add("--json", action="store_true", help="print the result as one JSON object")
    parsed = parser.parse_args(arguments)
    for name in ("clips", "frames"):
        if getattr(parsed, name) < 1:
            parser.error(f"--{name} {getattr(parsed, name)}: at least 1")
    return parsed


@prints_errors
def main() -> int:
    arguments = parse()
    import torch

    from trainer.inspection.batch_replay import replay_step
    from trainer.inspection.replay_report import as_json, report_lines, write_replay
    from trainer.monitoring.progress import show_progress
    from trainer.monitoring.run_dir import RunDir

    has_gpu = torch.cuda.is_available()
    if arguments.device == "cuda" and not has_gpu:
        print("error: --device cuda: torch sees no GPU here", file=sys.stderr)
        return 2
    device = torch.device("cuda", 0) if has_gpu and arguments.device != "cpu" else torch.device("cpu")
    out = arguments.out or Path(f"step-{arguments.step}.png")
    with ExitStack() as stack:
        if arguments.json:
            stack.enter_context(redirect_stdout(sys.stderr))
        making = stack.enter_context(show_progress("clips"))
        done = replay_step(
            RunDir(arguments.run),
            arguments.step,
            device=device,
            shown=arguments.clips,
            columns=arguments.frames,
            manifests=arguments.train,
            making=making,
        )
        write_replay(out, done)
    if arguments.json:
        print(json.dumps(as_json(done, out), indent=1))
    else:
        print(*report_lines(done), f"wrote {printable(out)}", sep="\n")
    return 2 if done.equal is False else 0


if __name__ == "__main__":
    exit_with(main, "interrupted")
