"""The guide's table of readable files equals the results for the test files."""

from pathlib import Path

import pytest

from tests.pipelines.readable import tables


@pytest.mark.soak
def test_the_guide_has_the_current_tables() -> None:
    assert tables() in (Path(__file__).parents[3] / "docs/guide.md").read_text(encoding="utf-8")
