"""The wheel: one package, and every command works in an environment of its own."""

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from launch.cli import commands
from tests.integration.processes import ROOT

PARTS = ("launch", "trainer", "pipelines", "benchmarks", "models")
SHORT = [
    f"--set={setting}"
    for setting in (
        "data.embedded.train_clips=64",
        "data.embedded.val_clips=16",
        "optimisation.epochs=1",
        "optimisation.warmup_epochs=0.5",
        "evaluation.every_epochs=1",
        "engine.device=cpu",
    )
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the project's folder."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in (*PARTS, "recipes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", "dist"], cwd=folder, check=True, timeout=120)
    (built,) = folder.glob("dist/*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` folder of an environment with the wheel, which sees the dependencies installed here.

    A `.pth` file shows them: what their own `.pth` files do, as to make the clone importable, is left out.
    """
    home = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
    (packages,) = home.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    command = [sys.executable, "-m", "pip", "--python", str(home / "bin/python"), "install", "--quiet"]
    subprocess.run([*command, "--no-deps", "--ignore-installed", str(wheel)], check=True, timeout=120)
    return home / "bin"


def run(bin_folder: Path, *command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program of that environment, without what this one would find."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [str(bin_folder / command[0]), *command[1:]],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip


def test_a_wheel_holds_one_package_with_the_recipes_and_no_import_of_a_bare_name(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        modules = {name: archive.read(name).decode() for name in names if name.endswith(".py")}
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"uniformerv2"}
    data = [path.relative_to(ROOT) for part in (*PARTS, "recipes") for path in (ROOT / part).rglob("*")]
    for path in (path for path in data if path.suffix not in ("", ".py", ".pyc")):
        # An image is built from a clone.
        assert f"uniformerv2/{path}" in names or path.is_relative_to("launch/slurm/container"), path
    for path in (path for part in PARTS for path in (ROOT / part).rglob("*.py")):
        relative = path.relative_to(ROOT).as_posix()
        expected = (
            relative.removeprefix("launch/")
            if "launch/uniformerv2/" in relative
            else f"uniformerv2/{relative}"
        )
        assert expected in modules
    for name, text in modules.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                assert str(node.module).split(".")[0] not in PARTS, f"{name}:{node.lineno}"
                continue
            # A module that is named in a text, as for `python -m`, is not found under its old name either.
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                bare = re.match(rf"(?:{'|'.join(PARTS)})\.([a-z_]+)(?:\.|$)", node.value)
                found = bare and (ROOT / bare[0].rstrip(".").replace(".", "/"))
                assert not (found and (found.is_dir() or found.with_suffix(".py").is_file())), (
                    name,
                    node.value,
                )


@pytest.mark.soak
def test_a_run_from_an_empty_folder_with_the_wheel_alone(installed: Path, tmp_path: Path) -> None:
    collides = run(installed, "python", "-c", "import models", folder=tmp_path)
    assert collides.returncode == 1 and "No module named 'models'" in collides.stderr
    listed = run(installed, "uniformerv2", "--help", folder=tmp_path)
    assert all(f"  {name} " in listed.stdout for name in commands())
    for name in commands():
        helped = run(installed, "uniformerv2", name, "--help", folder=tmp_path)
        assert helped.returncode == 0 and f"usage: uniformerv2 {name}" in helped.stdout, helped.stderr
    checked = run(installed, "uniformerv2", "train", "--recipe", "quickstart", "--check", folder=tmp_path)
    assert checked.returncode == 0 and "893,064" in checked.stdout, checked.stderr
    assert not list(tmp_path.iterdir())
    trained = run(installed, "uniformerv2", "train", "--recipe", "quickstart", *SHORT, folder=tmp_path)
    assert trained.returncode == 0, trained.stderr
    weights = tmp_path / "runs/quickstart/weights.safetensors"
    # The same with two ranks, whose reading processes and launcher find the package as well.
    deepspeed = str(Path(sys.executable).with_name("deepspeed"))
    two = [deepspeed, "--quiet", "--num_gpus", "2", "--module", "uniformerv2.launch.train"]
    again = run(
        installed, "python", *two, "--recipe", "quickstart", "--run-dir", "runs/two", *SHORT, folder=tmp_path,
    )  # fmt: skip
    assert again.returncode == 0 and "2 ranks" in again.stdout, again.stderr
    program = (
        "import sys, torch, uniformerv2\n"
        "found = uniformerv2.load('runs/quickstart')\n"
        "print(found.class_names[0], tuple(found.model(torch.zeros(2, 3, 8, 64, 64)).shape))\n"
        "assert not {'models', 'trainer', 'pipelines', 'launch'} & set(sys.modules)\n"
    )
    loaded = run(installed, "python", "-c", program, folder=tmp_path)
    assert loaded.stdout == "move_left (2, 8)\n", loaded.stderr
    video = str(next((tmp_path / "data/motion/val").rglob("*.webm")))
    predicted = run(
        installed, "uniformerv2", "predict", "--weights", "runs/quickstart", video, folder=tmp_path
    )
    assert predicted.returncode == 0 and "%" in predicted.stdout, predicted.stderr
    exported = run(installed, "uniformerv2", "export", str(weights.parent), folder=tmp_path)
    assert exported.returncode == 0 and (tmp_path / "weights.safetensors").exists(), exported.stderr
    status = run(installed, "uniformerv2", "status", folder=tmp_path)
    assert status.returncode == 0 and "quickstart" in status.stdout
