"""The container recipes, without building them: they agree with each other, the Makefile and the files."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "launch" / "slurm" / "container"
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
DEFINITION = (FOLDER / "uniformerv2.def").read_text()


def instructions(kind: str) -> list[str]:
    """The arguments of each instruction of a kind in the Dockerfile, on one line."""
    text = re.sub(r"\\\n", " ", DOCKERFILE)
    return [line.removeprefix(kind).strip() for line in text.splitlines() if line.startswith(f"{kind} ")]


def section(name: str) -> list[str]:
    """The lines of a section of the definition, without comments."""
    body = re.split(r"^%", DEFINITION.partition(f"\n%{name}\n")[2], flags=re.MULTILINE)[0]
    return [line.strip() for line in body.splitlines() if line.strip() and not line.strip().startswith("#")]


def copied() -> dict[str, list[str]]:
    """The files that each recipe copies from the project's folder."""
    return {
        "Dockerfile": [source for line in instructions("COPY") for source in line.split()[:-1]],
        "uniformerv2.def": [line.split()[0] for line in section("files")],
    }


def installs(lines: list[str]) -> list[str]:
    """The arguments of each `pip install`, without --quiet and --no-cache-dir."""
    found = [line.partition("pip install ")[2] for line in lines if "pip install " in line]
    return [re.sub(r"--quiet |--no-cache-dir ", "", arguments) for arguments in found]


def test_the_copied_files_exist_and_are_the_same_in_both() -> None:
    docker, apptainer = copied().values()
    assert sorted(docker) == sorted(apptainer)
    for source in docker:
        assert (ROOT / source).exists(), source
    assert {line.split()[1] for line in section("files")} == {"/opt/uniformerv2/"}
    assert instructions("WORKDIR") == ["/opt/uniformerv2"]


def test_all_packages_are_copied() -> None:
    packages = re.search(r"^PARTS = \((.*)\)$", (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert packages is not None
    names = re.findall(r'"(\w+)"', packages[1])
    assert len(names) == 5
    assert {*names, "recipes", "setup.py", "pyproject.toml", "requirements.lock"} == set(
        copied()["Dockerfile"]
    )


def test_the_copied_files_are_not_ignored() -> None:
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    assert sorted(line[1:] for line in ignored if line.startswith("!")) == sorted(copied()["Dockerfile"])


def test_both_install_as_the_makefile_does() -> None:
    makefile = (ROOT / "Makefile").read_text().partition("$(VENV)/installed:")[2].partition("\n\n")[0]
    expected = installs(makefile.splitlines())
    assert len(expected) == 2
    assert installs(instructions("RUN")) == expected
    assert installs(section("post")) == expected


def test_both_have_one_base_with_a_python_that_the_makefile_accepts() -> None:
    (base,) = instructions("FROM")
    assert f"\nFrom: {base}\n" in DEFINITION
    version = re.match(r"python:(\d+)\.(\d+)-", base)
    assert version is not None and (int(version[1]), int(version[2])) >= (3, 11)


def test_both_have_the_same_system_packages_and_variables() -> None:
    system = [re.search(r"--no-install-recommends ([\w+ -]+?)( &&|$)", line) for line in section("post")]
    (apptainer,) = [match[1] for match in system if match]
    assert f"--no-install-recommends {apptainer} " in instructions("RUN")[0]
    docker = set(instructions("ENV")) - {"NVIDIA_VISIBLE_DEVICES=all"}  # Apptainer shows all GPUs of the job
    assert docker == {line.removeprefix("export ") for line in section("environment")}
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video" in docker


@pytest.mark.parametrize("name", ["post", "test", "environment"])
def test_the_scripts_are_scripts(name: str) -> None:
    script = "\n".join(section(name))
    assert script
    assert subprocess.run(["sh", "-n"], input=script, text=True).returncode == 0


def test_the_code_of_the_folder_a_job_starts_in_comes_first(tmp_path: Path) -> None:
    """Whatever version is in the image; both recipes set PYTHONPATH, a call by hand does not."""
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch" / "program.py").write_text("import trainer\nprint(trainer.__file__)\n")
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").touch()
    for variables, expected in (({"PYTHONPATH": "."}, tmp_path), ({}, ROOT)):
        result = subprocess.run(
            [sys.executable, "launch/program.py"], cwd=tmp_path, env=variables, capture_output=True, text=True
        )
        assert Path(result.stdout.strip()) == expected / "trainer" / "__init__.py", result.stderr
