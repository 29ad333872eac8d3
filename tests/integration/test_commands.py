"""The commands as a person types them; training is in test_training.py."""

from pathlib import Path

from tests.integration.processes import ROOT, typed


def test_check_says_what_a_run_would_do_and_what_is_missing(tmp_path: Path) -> None:
    result = typed("python", "launch/train.py", "--recipe", "recipes/k710_l14.yaml", "--check", folder=ROOT)
    assert result.returncode == 2, result.stderr
    for words in ("354,417,350", "665.6 GMACs", "512 clips a step"):
        assert words in result.stdout, words
    for words in ("error: a run could not start here:", "no manifest at data/k710/train.arrow", "no GPU"):
        assert words in result.stderr, words
