import pickle
from pathlib import Path

import numpy as np
import pytest

from pipelines.dataset.concat import Dataset, check_same_classes
from pipelines.dataset.manifest import Manifest, ManifestRow, write_manifest
from pipelines.errors import DataError

CLASSES = ("fall", "rise")


def made(path: Path, count: int, classes: tuple[str, ...] = CLASSES) -> Manifest:
    """A manifest of `count` rows whose frames count from 1."""
    rows = (
        ManifestRow(f"{path.stem}/{i}.mp4", 0, 0, i % 2, 1 + i, 25.0, 64, 48, "vp9") for i in range(count)
    )
    return write_manifest(path, rows, classes)


def test_samples_follow_the_order_of_the_manifests(tmp_path):
    sizes = {"a/one": 3, "b/empty": 0, "c/two": 2, "d/last": 0}
    for name, count in sizes.items():
        made(tmp_path / f"{name}.arrow", count)
    dataset = Dataset.open([tmp_path / f"{name}.arrow" for name in sizes])
    assert len(dataset) == 5
    assert dataset.starts == [0, 3, 3, 5]
    assert [dataset.row(sample).frames for sample in range(5)] == [1, 2, 3, 1, 2]
    assert dataset.path(2) == tmp_path / "a/one/2.mp4"
    assert dataset.path(np.int64(3)) == tmp_path / "c/two/0.mp4"
    assert dataset.class_names == CLASSES
    for sample in (-1, 5):
        with pytest.raises(IndexError, match=f"sample {sample} of .*one.arrow.* has 5 samples"):
            dataset.row(sample)


def test_fingerprint_of_one_and_of_several_manifests(tmp_path):
    one, two = made(tmp_path / "one.arrow", 3), made(tmp_path / "two.arrow", 3)
    assert Dataset([one]).fingerprint == one.fingerprint
    several = [[one, two], [two, one], [one, two, two]]
    assert len({one.fingerprint, *(Dataset(parts).fingerprint for parts in several)}) == 4
    assert Dataset([one, two]).fingerprint == Dataset.open([one.path, two.path]).fingerprint


def test_a_dataset_pickles_as_paths_and_refuses_a_replaced_manifest(tmp_path):
    dataset = Dataset([made(tmp_path / "one.arrow", 2000), made(tmp_path / "two.arrow", 3000)])
    dataset.row(4000)
    pickled = pickle.dumps(dataset)
    assert len(pickled) < 1500
    again = pickle.loads(pickled)
    assert (len(again), again.fingerprint) == (5000, dataset.fingerprint)
    assert again.row(4000) == dataset.row(4000)
    made(tmp_path / "two.arrow", 2999)
    with pytest.raises(DataError, match=r"two\.arrow was replaced"):
        pickle.loads(pickled)


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (("fall", "leap"), "label 1 is 'rise' in the first and 'leap' in the second"),
        (("rise", "fall"), "label 0 is 'fall' in the first and 'rise' in the second"),
        (("fall", "rise", "leap"), "the first has 2, the second 3"),
    ],
)
def test_manifests_with_different_classes_are_refused_with_the_first_difference(tmp_path, other, difference):
    one, two = made(tmp_path / "one.arrow", 3), made(tmp_path / "two.arrow", 3, other)
    with pytest.raises(DataError, match=rf"one\.arrow and .*two\.arrow have different classes: {difference}"):
        Dataset([one, one, two])
    check_same_classes(one, one)


def test_a_dataset_needs_a_manifest():
    with pytest.raises(DataError, match="at least one manifest"):
        Dataset.open([])
