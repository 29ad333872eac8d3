"""The command `uniformerv2`."""

import importlib
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launch.cli import LAUNCH, about, command_line, commands, main
from launch.train import parse
from tests.integration.processes import ROOT
from trainer.command import command_parser


def test_every_script_is_a_command_with_a_description() -> None:
    found = commands()
    scripts = {path for path in LAUNCH.rglob("*.py") if '__name__ == "__main__"' in path.read_text()}
    hidden = {LAUNCH / "cli.py", LAUNCH / "slurm/turn.py", LAUNCH / "uniformerv2/__main__.py"}
    assert set(found.values()) == scripts - hidden
    assert found["verify-gpu"].name == "verify_gpu.py" and found["submit"].parent.name == "slurm"
    for name, script in found.items():
        assert about(script), name


def test_help_lists_all_commands_and_an_unknown_one_gets_a_suggestion(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for name, script in commands().items():
        assert f"  {name} " in shown and about(script) in shown
    with pytest.raises(SystemExit) as ended:
        main(["trian"])
    assert ended.value.code == 2 and "did you mean train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "suggested"), [(["bench", "modle"], "model"), (["prepare", "kinetcs"], "kinetics")]
)
def test_an_unknown_job_gets_a_suggestion(
    arguments: list[str], suggested: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, job = arguments
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(f"launch.{name}").parse([job])
    assert f"invalid choice: '{job}'" in (shown := capsys.readouterr().err)
    assert f"did you mean {suggested}?" in shown


def test_the_help_of_a_training_has_its_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert "Exit codes:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "variables", "launched"),
    [
        ([], {"CUDA_VISIBLE_DEVICES": "0,1"}, True),
        ([], {"CUDA_VISIBLE_DEVICES": "0"}, False),
        ([], {"CUDA_VISIBLE_DEVICES": ""}, False),
        (["--check"], {"CUDA_VISIBLE_DEVICES": "0,1"}, False),
        ([], {"CUDA_VISIBLE_DEVICES": "0,1", "SLURM_PROCID": "0"}, False),
        ([], {"CUDA_VISIBLE_DEVICES": "0,1", "RANK": "1"}, False),
    ],
)
def test_training_on_several_gpus_starts_the_launcher_once(
    arguments: list[str], variables: dict[str, str], launched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "PMI_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    command = command_line("train", ["--recipe", "r", *arguments])
    assert command[0] == sys.executable and str(LAUNCH / "train.py") in command
    assert (Path(command[1]).name == "deepspeed") == launched
    assert ("--quiet" in command) == launched
    assert "--quiet" not in command_line("status", [])


def test_the_exit_code_and_the_output_are_the_script_s(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "uniformerv2", "train", "--recipe", "nowhere.yaml"]
    path = f"{ROOT}:{LAUNCH}"  # as before an installation
    result = subprocess.run(
        command,
        cwd=tmp_path,
        env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and "nowhere.yaml" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("name", ["predict", "replay-batch", "submit"])
def test_the_usage_names_the_command(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # the handler would stay in this process
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: uniformerv2 {name} [-h]")


def test_a_wrong_argument_is_named_first_and_as_the_command_was_called(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": f"{ROOT}:{LAUNCH}", "PATH": "/usr/bin:/bin"}
    for start, called in (
        (["-m", "uniformerv2", "prepare"], "uniformerv2 prepare"),
        ([str(LAUNCH / "prepare.py")], "prepare.py"),
    ):
        result = subprocess.run(
            [sys.executable, *start, "folder", "videos", "--otu", "a.arrow"],
            cwd=tmp_path, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 2
        assert f"{called} folder: error: unknown option --otu; did you mean --out?" in result.stderr


def test_every_command_names_an_unknown_option_first() -> None:
    for name, script in commands().items():
        text = script.read_text(encoding="utf-8")
        assert "command_parser(" in text and "argparse.ArgumentParser(" not in text, name


@pytest.mark.parametrize(
    ("arguments", "unknown"),
    [
        (["--otu", "x"], "--otu; did you mean --out?"),
        (["--nothing=1"], "--nothing; --help lists"),
        (["--batch", "4"], "--batch; --help lists"),
        (["-x"], "-x; --help"),
        (["--out", "a", "job", "--ouy"], "--ouy; --help"),  # an option of the job
        (["--out", "a", "--ou", "b", "--", "--otu"], ""),
        (["--out", "a", "--value", "-3"], ""),
        (["--out", "a", "--value", "--not an option"], ""),
    ],
)
def test_unknown_options(arguments: list[str], unknown: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = command_parser("about")
    parser.add_argument("--out", required=True)
    parser.add_argument("--value")
    parser.add_argument("--last")
    if "job" in arguments:
        parser.add_subparsers().add_parser("job").add_argument("--in", required=True)
    else:
        parser.add_argument("rest", nargs="*")
    if unknown:
        with pytest.raises(SystemExit):
            parser.parse_args(arguments)
        assert f"error: unknown option {unknown}" in capsys.readouterr().err
    else:
        parser.parse_args(arguments)
