"""The commands as a person types them; training is in test_training.py."""

import os
import sys
from unittest import mock

import pytest

import launch.train
from tests.integration.processes import ROOT, typed

SAID = ("354,417,350", "665.6 GMACs", "512 clips a step")
REFUSED = ("error: a run could not start here:", "no manifest at data/k710/train.arrow", "no GPU")


def test_check_says_what_a_run_would_do_and_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["train.py", "--recipe", "recipes/k710_l14.yaml", "--check"])
    with mock.patch.dict(os.environ):  # which it may add to
        assert launch.train.main() == 2
    said = capsys.readouterr()
    for words in SAID:
        assert words in said.out, words
    for words in REFUSED:
        assert words in said.err, words


@pytest.mark.soak
def test_check_as_typed() -> None:
    result = typed("python", "launch/train.py", "--recipe", "recipes/k710_l14.yaml", "--check", folder=ROOT)
    assert result.returncode == 2, result.stderr
    for words in SAID:
        assert words in result.stdout, words
    for words in REFUSED:
        assert words in result.stderr, words
