"""Manifests with random damage, read in a separate process: read, or refused with a message."""

import struct
from collections.abc import Iterator
from typing import Any

import pytest

from pipelines.dataset import manifest
from pipelines.dataset.manifest import write_manifest
from tests.pipelines.damaged_manifests import ManifestReader, change_rows
from tests.pipelines.dataset.test_damaged_manifest import CLASSES, ROWS

pytest.importorskip("hypothesis", reason="part of the extra `dev`")
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def reader() -> Iterator[ManifestReader]:
    with ManifestReader() as reader:
        yield reader


NUMBERS = st.sampled_from([0, 1, -1, 3, 7, 8, 64, 2**15, 2**31 - 1, -(2**31), 2**40, 2**63 - 8, -(2**63)])
PLACES = st.floats(0, 1, exclude_max=True)
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), PLACES, st.integers(0, 7)),
        st.tuples(st.just("number"), PLACES, NUMBERS),
        st.tuples(st.just("cut"), PLACES, st.integers(1, 64)),
        st.tuples(st.just("insert"), PLACES, st.integers(1, 64)),
        st.tuples(st.just("zero"), PLACES, st.integers(1, 512)),
        st.tuples(st.just("end"), PLACES, st.just(0)),
    ),
    min_size=1,
    max_size=3,
)


def changed(content: bytes, changes: list[tuple[str, float, int]]) -> bytes:
    """`content` after changes, each of a kind, at a place given as a share, and by an amount."""
    data = bytearray(content)
    for kind, share, amount in changes:
        place = int(share * len(data))
        if kind == "flip":
            data[place] ^= 1 << amount
        elif kind == "number":
            size = 8 if place % 8 < 4 else 4
            place -= place % size
            number = struct.pack("<q", amount)[:size]
            data[place : place + size] = number[: len(data) - place]
        elif kind == "cut":
            del data[place : place + amount]
        elif kind == "insert":
            data[place:place] = bytes(range(amount))
        elif kind == "zero":
            data[place : place + amount] = bytes(min(amount, len(data) - place))
        else:
            del data[place:]
        if not data:
            break
    return bytes(data)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(with_weights=st.booleans(), changes=CHANGES)
def test_no_damage_crashes_a_process_or_raises_another_error(
    reader: ManifestReader,
    tmp_path_factory: pytest.TempPathFactory,
    with_weights: bool,
    changes: list[tuple[str, float, int]],
) -> None:
    folder = tmp_path_factory.getbasetemp()
    original = folder / f"whole-{with_weights}.arrow"
    if not original.exists():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(manifest, "ROWS_PER_BATCH", 4)
            write_manifest(original, ROWS, CLASSES, weighted=with_weights, sources=not with_weights)
        assert reader.read(original) == "read"
    damaged = folder / "damaged.arrow"
    damaged.write_bytes(changed(original.read_bytes(), changes))
    result = reader.read(damaged)
    assert result == "read" or str(damaged) in result


VALUES = st.fixed_dictionaries(
    {},
    optional={
        "label": st.integers(-(2**31), 2**31 - 1),
        "frames": st.integers(-(2**31), 2**31 - 1),
        "width": st.integers(-(2**31), 2**31 - 1),
        "height": st.integers(-2, 2),
        "fps": st.floats(width=32),
        "offset": st.integers(-(2**63), 2**63 - 1),
        "length": st.integers(-(2**63), 2**63 - 1),
        "path": st.text(st.characters(exclude_categories=["Cs"]), max_size=9) | st.just("\0e9.mp4"),
        "codec": st.text(st.characters(exclude_categories=["Cs"]), max_size=9),
        "weight": st.floats(),
        "weight_before": st.floats(),
        "source": st.integers(-2, 3),
        "first_frame": st.integers(-2, 3) | st.integers(-(2**31), 2**31 - 1),
        "video_frames": st.integers(100, 120) | st.integers(-(2**31), 2**31 - 1),
    },
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(changes=st.dictionaries(st.integers(0, 9), VALUES, max_size=3))
def test_no_value_of_a_row_crashes_a_process_or_raises_another_error(
    reader: ManifestReader, tmp_path_factory: pytest.TempPathFactory, changes: dict[int, dict[str, Any]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "values.arrow"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "ROWS_PER_BATCH", 4)
        write_manifest(path, ROWS, CLASSES, weighted=True, sources=True)
    change_rows(path, changes)
    result = reader.read(path)
    assert result == "read" or str(path) in result
