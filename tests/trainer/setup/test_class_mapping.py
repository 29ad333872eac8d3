"""Rows of a trained head for the classes of a manifest, mainly those of Kinetics."""

import hashlib
import json

import pytest

from pipelines.dataset import kinetics710
from trainer.errors import RunError
from trainer.setup.class_mapping import find_head_rows, match_rows_by_name

UNION = kinetics710.class_names("k710")


@pytest.mark.parametrize(
    ("table", "others", "digest"),
    [
        ("k400", 13, "dbccfb4a53a1cdbd"),
        ("k600", 2, "320ebe07388c7cb7"),
        ("k700", 1, "ab8cb8c0a9665e8d"),
    ],
)
def test_every_class_of_kinetics_has_a_row_in_the_union(
    table: kinetics710.Table, others: int, digest: str
) -> None:
    names = kinetics710.class_names(table)
    rows = find_head_rows(UNION, names)
    assert len(set(rows)) == len(names) == int(table[1:])
    # mmaction2's map_k*.json, as json.dumps writes them.
    assert hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest()[:16] == digest
    assert (
        sum(UNION[row].casefold() != name.casefold() for row, name in zip(rows, names, strict=True)) == others
    )
    assert find_head_rows(UNION, [name.replace(" ", "_").upper() for name in names]) == rows


def test_the_three_overlap_as_published() -> None:
    k4, k6, k7 = (set(find_head_rows(UNION, kinetics710.class_names(t))) for t in ("k400", "k600", "k700"))
    assert (len(k4 | k6 | k7), len(k4 & k6), len(k4 & k7), len(k6 & k7)) == (710, 382, 392, 598)
    assert (len(k4 - k6 - k7), len(k6 - k4 - k7), len(k7 - k4 - k6)) == (8, 2, 92)


def test_the_released_order_agrees_with_the_overlap_of_the_three() -> None:
    """The authors' row tables and the class names agree on the rows outside Kinetics-600 and -700."""
    released = kinetics710.class_names("k400_released")
    assert sorted(released) == sorted(kinetics710.class_names("k400"))
    for classes, table in ((600, "k600"), (700, "k700")):
        rows = kinetics710.released_rows()[classes]
        assert len(set(rows)) == classes
        known = set(find_head_rows(UNION, kinetics710.class_names(table)))  # type: ignore[arg-type]
        absent = {row for row, name in enumerate(released) if find_head_rows(UNION, [name])[0] not in known}
        assert absent == set(range(400)) - set(rows)


def test_synonyms_apply_to_kinetics_only() -> None:
    k400, k700 = kinetics710.class_names("k400"), kinetics710.class_names("k700")
    assert find_head_rows(k400, ["sipping cup", "tying necktie"]) == (
        k400.index("drinking"),
        k400.index("tying tie"),
    )
    assert match_rows_by_name(k700, k400).count(None) == 8
    assert match_rows_by_name(("my own", "drinking"), ("sipping cup", "another")) == (None, None)


def test_a_refusal_names_the_first_differences_and_the_nearest_class() -> None:
    with pytest.raises(RunError) as refused:
        find_head_rows(("archery", "abseiling"), ["Archery", "abseilling", *(f"new {n}" for n in range(9))])
    text = str(refused.value)
    assert "10 of the manifest's 11" in text and "'abseilling'; the model has 'abseiling'" in text
    assert "new 3" in text and "new 4" not in text and "5 more" in text
    with pytest.raises(RunError, match="--classes"):
        find_head_rows(("archery",), ["0"])
