"""Tables and lists of class names of any content."""

import pytest

from pipelines.dataset.prepare.class_names import read_class_names
from pipelines.dataset.prepare.table import read_table
from pipelines.errors import DataError

pytest.importorskip("hypothesis")
from hypothesis import given, settings
from hypothesis import strategies as st

CELLS = st.text(st.characters(exclude_categories=()), max_size=8) | st.sampled_from(
    [
        "v1.mp4",
        "path",
        "label",
        '"',
        ",",
        ";",
        "\t",
        "#",
        "0",
        "1.0",
        "-1",
        "'",
        "\\",
        "~",
        "$HOME",
        "\n",
        "\r",
        "\0",
    ]
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.lists(CELLS, max_size=4), max_size=5), st.sampled_from([",", ";", "\t", " ", "|"]))
def test_any_text_is_read_or_refused_with_a_message(tmp_path_factory, cells, separator):
    content = "\n".join(separator.join(row) for row in cells).encode("utf-8", "surrogatepass")
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(content)
    for reader in (read_table, read_class_names):
        try:
            found = reader(path)
        except DataError as error:
            assert "any.csv" in str(error)
        else:
            assert found
