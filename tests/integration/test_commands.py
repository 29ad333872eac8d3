"""The commands as a user types them. Training is in test_training.py."""

import os
import sys
from unittest import mock

import pytest

import launch.train
from tests.integration.processes import ROOT, typed

FIGURES = ("354,417,350", "665.6 GMACs", "512 clips a step")
REFUSED = ("error: a run could not start here:", "no manifest at data/k710/train.arrow", "no GPU")


def test_check_prints_the_figures_and_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train.py", "--recipe", "recipes/k710_l14.yaml", "--check"])
    with mock.patch.dict(os.environ):  # restores the variables
        assert launch.train.main() == 2
    printed = capsys.readouterr()
    for text in FIGURES:
        assert text in printed.out, text
    for text in REFUSED:
        assert text in printed.err, text


@pytest.mark.soak
def test_check_as_a_command() -> None:
    result = typed("python", "launch/train.py", "--recipe", "recipes/k710_l14.yaml", "--check", folder=ROOT)
    assert result.returncode == 2, result.stderr
    for text in FIGURES:
        assert text in result.stdout, text
    for text in REFUSED:
        assert text in result.stderr, text
