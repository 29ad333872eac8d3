"""The scripts that make a manifest in parts, and submissions that cannot work."""

import subprocess
import sys
from pathlib import Path

import pytest

from launch import prepare
from pipelines.errors import DataError
from trainer.cluster.job_options import add_job_options
from trainer.cluster.prepare_jobs import submit_manifest
from trainer.command import command_parser
from trainer.errors import RunError, UserError


def print_scripts(
    *arguments: str, parts: int = 3, options: tuple[str, ...] = (), after: str | None = None
) -> None:
    parser = command_parser("x")
    add_job_options(parser)
    parser.set_defaults(parts=parts, recipe=[], array=2, dry_run=True, after=after, training=list(arguments))
    submit_manifest(parser.parse_args([*options, "--gpus-per-node", "8"]), prepare.parse, "made by a test")


def test_the_scripts_are_valid_and_each_part_is_a_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "v").mkdir()
    out = tmp_path / "m.arrow"
    command = ("folder", f"{tmp_path}/v", "--out", str(out), "--extension", "$HOME; rm x")
    print_scripts(*command, options=("--cpus-per-rank", "6", "--time", "30", "--lead", "60"))
    text = capsys.readouterr().out
    waits = "--dependency=afterok:JOB1 --kill-on-invalid-dep=yes"
    parts, _, merge = text.partition(f"# ---- after all parts, with {waits} ----\n")
    for script in (parts, merge):
        assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
        assert "#SBATCH --cpus-per-task=6\n" in script and "gpus" not in script
    assert "#SBATCH --array=1-3%2\n" in parts and "--array" not in merge
    assert f"--output={out}.slurm/part-%A_%a.log" in parts
    assert f" merge {out}" in merge
    # What the shell makes of the last line is what prepare.py parses.
    line = parts.strip().splitlines()[-1].replace("exec", "printf '%s\\n'", 1)
    words = subprocess.run(
        ["bash", "-c", line], env={"SLURM_ARRAY_TASK_ID": "2"}, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert words[0] == sys.executable
    args = prepare.parse(words[2:])
    assert (args.part, args.workers, args.extension) == ((1, 3), 6, ["$HOME; rm x"])
    print_scripts(*command, after="123")
    assert capsys.readouterr().out.startswith("# ---- the parts, with --dependency=afterany:123 ----\n#!")


@pytest.mark.parametrize(
    ("arguments", "parts", "token"),
    [
        (("verify", "m.arrow"), 3, "makes a manifest"),
        (("folder", "v", "--out", "m.arrow", "--part", "1/2"), 3, "--part"),
        (("folder", "v", "--out", "m.arrow"), 0, "--parts 0"),
        (("folder", "v\nw", "--out", "m.arrow"), 3, "several lines"),
        (("folder", "v", "--out", "a b/m.arrow"), 3, "no blanks"),
    ],
)
def test_what_cannot_work_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], parts: int, token: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises((RunError, UserError, DataError), match=token):
        print_scripts(*arguments, parts=parts)
