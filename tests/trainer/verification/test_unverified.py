"""The list of what is not verified on a GPU: each row names a test or a step that exists."""

import re
from pathlib import Path

import pytest

from tests.conftest import ON_DEVICE
from trainer.verification.steps import STEPS

ROOT = Path(__file__).parents[3]
TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
STEP = re.compile(r"step `(\w+)`")


def rows(heading: str) -> list[tuple[str, str]]:
    """What, and the command, of each row of the table below a heading of docs/performance.md."""
    text = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    section = re.split(r"^#", text.partition(f"\n{heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")]
    return [(what, command) for what, command in lines[1:]]


ON_ONE = rows("## Not verified on a GPU")
ON_SEVERAL = rows("### Not verified on several GPUs or nodes")


def test_the_tables_are_found() -> None:
    assert len(ON_ONE) > 20 and len(ON_SEVERAL) > 5


@pytest.mark.parametrize(("what", "command"), ON_ONE, ids=[what[:40] for what, _ in ON_ONE])
def test_what_is_not_verified_on_a_gpu_names_a_test_or_a_step(what: str, command: str) -> None:
    tests, steps = TEST.findall(command), STEP.findall(command)
    assert tests or steps
    assert set(steps) <= {step.name for step in STEPS}
    for file, test in tests:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert ON_DEVICE.search(source), f"{file} has no test that runs on a device"
        assert not test or f"\ndef {test}(" in source


@pytest.mark.parametrize(("what", "command"), ON_SEVERAL, ids=[what[:40] for what, _ in ON_SEVERAL])
def test_what_needs_several_gpus_names_files_that_exist(what: str, command: str) -> None:
    assert "`" in command
    for file in re.findall(r"(?:launch|tests|recipes)/[\w/]+\.\w+", command):
        assert (ROOT / file).exists()
