"""Scores of two models paired video by video, against counts by hand."""

from pathlib import Path

import pytest

from tests.trainer.tracking.comparison.run_folders import make_run, write_scores
from trainer.errors import RunError
from trainer.evaluation.significance import PairedCounts, mcnemar
from trainer.tracking.comparison.compare import compare
from trainer.tracking.comparison.folder_source import read_folder
from trainer.tracking.comparison.paired_scores import PairedScores, pair, read_scores

LABELS = [0, 1, 2, 0, 1]


def test_rows_of_one_manifest_are_paired(tmp_path: Path) -> None:
    write_scores(tmp_path / "one", labels=LABELS, predictions=[0, 1, 0, None, 1])
    write_scores(tmp_path / "two", labels=LABELS[::-1], predictions=[0, 0, 2, 1, 0], rows=[4, 3, 2, 1, 0])
    # right: one at rows 0, 1, 4; two at rows 0 (0), 1 (1), 2 (2); row 3 one could not read; row 4 0 for 1.
    pairs = pair(read_scores(tmp_path / "one"), read_scores(tmp_path / "two"))
    counts = PairedCounts(both=2, only_first=1, only_second=1, neither=0)
    assert pairs == PairedScores(counts, only_first=0, only_second=0, unread=1, other_label=0, ambiguous=0)


def test_videos_of_other_manifests_are_paired_by_path(tmp_path: Path) -> None:
    names = ["a", "b", "c", "twice", "twice"]
    write_scores(tmp_path / "one", labels=LABELS, predictions=[0, 1, 2, 0, 1], paths=names)
    write_scores(
        tmp_path / "two", labels=[2, 1, 0, None, 1, 0], predictions=[2, 0, 0, 0, 1, 0],
        paths=["c", "b", "a", "d", "twice", "e"], rows=[9, 8, 7, 6, 5, 4], fingerprint="x",
    )  # fmt: skip
    pairs = pair(read_scores(tmp_path / "one"), read_scores(tmp_path / "two"))
    assert pairs.counts == PairedCounts(both=2, only_first=1, only_second=0, neither=0)
    assert (pairs.only_first, pairs.only_second, pairs.ambiguous) == (0, 3, 2)


def test_other_labels_and_missing_ones_are_left_out(tmp_path: Path) -> None:
    write_scores(tmp_path / "one", labels=[0, 1, None], predictions=[0, 1, 1])
    write_scores(tmp_path / "two", labels=[0, 2, None], predictions=[1, 2, 1])
    pairs = pair(read_scores(tmp_path / "one"), read_scores(tmp_path / "two"))
    assert pairs.counts == PairedCounts(both=0, only_first=1, only_second=0, neither=0)
    assert (pairs.other_label, pairs.unread) == (1, 1)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet at all" * 100])
def test_other_files_than_scores_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "scores.parquet").write_bytes(content)
    with pytest.raises(RunError, match=r"scores\.parquet"):
        read_scores(tmp_path / "scores.parquet")


def test_a_file_without_its_columns_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"row": [1], "path": ["a"]}), tmp_path / "scores.parquet")
    with pytest.raises(RunError, match="label, prediction"):
        read_scores(tmp_path / "scores.parquet")
    bad = pa.table({"row": ["x"], "path": ["a"], "label": [0], "prediction": [0]})
    pq.write_table(bad, tmp_path / "scores.parquet")
    with pytest.raises(RunError, match=r"scores\.parquet"):
        read_scores(tmp_path / "scores.parquet")


def test_runs_are_tested_against_the_baseline(tmp_path: Path) -> None:
    right = [0, 1, 2] * 10
    found = []
    for name, wrong, top1 in (("best", 2, 0.9), ("worse", 12, 0.6), ("worst", 20, 0.3)):
        predictions = [(label + 1) % 3 if place < wrong else label for place, label in enumerate(right)]
        path = make_run(tmp_path / name, top1={4: top1}, scores={"labels": right, "predictions": predictions})
        found.append(read_folder(path))
    make_run(tmp_path / "without", top1={4: 0.95})
    found.append(read_folder(tmp_path / "without"))
    comparison = compare(found)
    assert comparison.runs[comparison.baseline].name == "best"  # the best of those with scores
    worse, worst = comparison.tests
    assert worse.pairs.counts == PairedCounts(both=18, only_first=10, only_second=0, neither=2)
    assert (worse.p, worst.p) == pytest.approx((2 / 2**10, 2 / 2**18))
    assert (worse.adjusted, worst.adjusted) == pytest.approx((2 / 2**10, 4 / 2**18))
    assert worst.low < worst.pairs.counts.difference == -0.6 < worst.high < 0
    other = compare(found, baseline=str(tmp_path / "worse"))
    assert other.runs[other.baseline].name == "worse"
    assert {other.runs[test.run].name: test.pairs.counts.difference for test in other.tests} == {
        "best": pytest.approx(1 / 3),
        "worst": pytest.approx(-8 / 30),
    }
    assert mcnemar(other.tests[0].pairs.counts) == worse.p


def test_runs_without_a_video_in_common_are_not_tested(tmp_path: Path) -> None:
    """An empty test would read as "no difference", and make the other tests weaker by Holm."""
    for name, paths in (("base", ["a", "b"]), ("same", ["a", "b"]), ("other", ["c", "d"])):
        make_run(tmp_path / name, top1={4: 0.9 if name == "base" else 0.5})
        write_scores(
            tmp_path / name / "scores.parquet",
            labels=[0, 1],
            predictions=[0, 1],
            paths=paths,
            fingerprint=f"of {paths}",
        )
    found = compare([read_folder(tmp_path / name) for name in ("base", "same", "other")])
    assert [found.runs[test.run].name for test in found.tests] == ["same"]
    (note,) = [note for note in found.notes if "none of the baseline's videos" in note]
    place = [run.name for run in found.runs].index("other")
    assert note.startswith(f"Run {place + 1}:")


def test_damaged_scores_stop_nothing(tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", top1={4: 0.5}, scores={"labels": [0, 1], "predictions": [0, 1]})
    other = make_run(tmp_path / "other", top1={4: 0.4})
    (other / "scores.parquet").write_bytes(b"PAR1 damaged")
    comparison = compare([read_folder(one), read_folder(other)])
    assert comparison.tests == []
    assert len(comparison.notes) == 1 and str(other) in comparison.notes[0]


def test_scores_of_another_step_than_the_last_evaluation_are_named(tmp_path: Path) -> None:
    """As of a run that trains on after its end: the file is that of the end before."""
    scores = {"labels": [0, 1], "predictions": [0, 1]}  # of step 4
    stale = make_run(tmp_path / "stale", losses=[1.0] * 6, top1={4: 0.4, 6: 0.6}, scores=scores)
    own = make_run(tmp_path / "own", top1={4: 0.5}, scores=scores)
    (note,) = compare([read_folder(stale), read_folder(own)]).notes
    assert note.startswith("Run 1:") and "step 4" in note and "step 6" in note
