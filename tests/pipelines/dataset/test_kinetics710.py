"""The table of Kinetics-710 against the published label maps and the paper."""

import hashlib
import json
from collections import Counter

import pytest

from pipelines.dataset import kinetics710

# SHA-256 of what mmaction2 and the authors publish: names joined by line ends, rows as JSON.
PUBLISHED = {
    "k400": "a8dafb93a1204d4ecfa904f943ce5ee0c62ddeeb1df71aa1f96983fca17d777e",  # label_map_k400.txt
    "k600": "5d9a560f98fcfed08f6129dd498f97e043edf729efb3c02dd96b482d2970f9c0",
    "k700": "a34c9fed41f5f9ed56d95b7d0f60ce3af073064691da8dc75dcda06f394af1c9",
    "k710": "ad8b369e6296b0d5a2dd48cb469aaec882144a6a0680163cdf6588d188297dd9",
    "k400_released": "12054c1d688d9841466933ceebc1927766fda98337a90b5c780489d52186ddc4",
}
UNION_ROWS = {  # map_k400.json, map_k600.json, map_k700.json
    "k400": "dbccfb4a53a1cdbd26de3993774df79ea60ffeeeaa767b9f623ad839cdfbaaf5",
    "k600": "320ebe07388c7cb7c0ae4a6ea97e5cbcb8d8149c65e24d91b562d8140f5ee571",
    "k700": "ab8cb8c0a9665e8d3341a5986265d67af596b7da7efe2232202111ff2c903766",
}
RELEASED_ROWS = {  # label_mixto600.json, label_mixto700.json
    600: "ecf2dcefec5043154f24d1d711269235e8bbecee78ad3a25537c02b71879767a",
    700: "fee67f2624b46e6c7342d47763da786a259c13d350c6b086ef8c66fa417acad8",
}


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize("table", PUBLISHED)
def test_names_and_order_are_those_published(table):
    assert digest("\n".join(kinetics710.class_names(table))) == PUBLISHED[table]


@pytest.mark.parametrize("table", UNION_ROWS)
def test_rows_in_the_union_are_mmaction2s(table):
    assert digest(json.dumps(kinetics710.union_rows(table))) == UNION_ROWS[table]


@pytest.mark.parametrize("classes", RELEASED_ROWS)
def test_rows_in_the_authors_union_are_theirs(classes):
    rows = kinetics710.released_rows()[classes]
    assert digest(json.dumps(rows)) == RELEASED_ROWS[classes] and len(rows) == classes


def test_the_union_has_the_paper_s_counts():
    """Appendix D: 8 classes only in Kinetics-400, and 2 only in Kinetics-600, beside Kinetics-700."""
    lines = kinetics710._lines()
    members = Counter(tuple(bool(line[f"k{size}_name"]) for size in (400, 600, 700)) for line in lines)
    assert len(lines) == len({line["class"] for line in lines}) == 710
    assert (members[True, False, False], members[False, True, False], members[False, False, True]) == (
        8,
        2,
        92,
    )
    in_both = {pair: sum(n for key, n in members.items() if key[pair[0]] and key[pair[1]]) for pair in PAIRS}
    assert in_both == PAIRS
    assert [int(line["mmaction2_row"]) for line in lines] == list(range(710))


PAIRS = {(0, 1): 382, (0, 2): 392, (1, 2): 598}  # of Kinetics-400, -600 and -700


def test_names_that_differ_from_the_union_are_synonyms():
    for table, count in (("k400", 13), ("k600", 3), ("k700", 1)):
        union, rows = kinetics710.class_names("k710"), kinetics710.union_rows(table)
        names = kinetics710.class_names(table)
        other = {name: union[row] for name, row in zip(names, rows, strict=True) if name != union[row]}
        assert len(other) == count and other.items() <= kinetics710.synonyms().items()


def test_the_two_label_spaces_of_kinetics_400_have_the_same_classes():
    assert sorted(kinetics710.class_names("k400")) == sorted(kinetics710.class_names("k400_released"))
