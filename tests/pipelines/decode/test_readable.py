"""The guide's table of what can be read is what the files at hand come to."""

from pathlib import Path

import pytest

from tests.pipelines.readable import tables


@pytest.mark.soak
def test_the_guide_has_the_tables_as_they_are_made() -> None:
    assert tables() in (Path(__file__).parents[3] / "docs/guide.md").read_text(encoding="utf-8")
