"""Scores on disk: written whole or not at all, gathered from ranks in order, gone on with."""

import resource
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.bad_samples import BadSample, BadSamples
from pipelines.loader import ClipBatch
from pipelines.sampling.sampler import ViewSampler
from tests.trainer.ranks import Ranks
from trainer.errors import RunError
from trainer.evaluation import scores as module
from trainer.evaluation.evaluation_dir import EvaluationDir
from trainer.evaluation.scores import ScoreFile, ScoreGatherer, ScoreMetadata, row_groups, schema, tensors_of

METADATA = ScoreMetadata("val.arrow", "f" * 64, ("a", "b", "c"), 2, 3, 7, "run")
IDENTITY = {"weights_sha256": "1" * 64, "clips": 2}


def some(first: int, end: int, bad: tuple[int, ...] = ()) -> pa.Table:
    """Rows of three classes, of the label of each row the score 0.5, and of the bad ones none."""
    rows = []
    for row in range(first, end):
        label, is_bad = row % 3, row in bad
        rows.append(
            {
                "row": row,
                "path": f"v{row}.mp4",
                "label": label,
                "prediction": None if is_bad else label,
                "correct_top5": None if is_bad else True,
                "scores": [None if is_bad else 0.5 if k == label else 0.25 for k in range(3)],
                "reason": "is cut off" if is_bad else None,
            }
        )
    return pa.Table.from_pylist(rows, schema=schema(3))


def test_a_written_file_is_read_with_its_metadata(tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    with ScoreFile(path, schema(3, METADATA)) as file:
        file.write(some(0, 5, bad=(1,)))
        file.write(some(5, 9))
    table = pq.read_table(path)
    assert table.column_names == ["row", "path", "label", "prediction", "correct_top5", "scores"]
    assert table["row"].to_pylist() == list(range(9))
    assert table["scores"].type == pa.list_(pa.float32(), 3)
    assert table["scores"][1].as_py() == [None] * 3 and table["scores"][2].as_py() == [0.25, 0.25, 0.5]
    assert table["prediction"][1].as_py() is None and table["label"][1].as_py() == 1
    assert b'"step": 7' in table.schema.metadata[b"uniformerv2"]
    (rows,) = row_groups(path)
    scores, labels, valid = tensors_of(rows)
    assert valid.tolist() == [True, False] + [True] * 7 and labels.tolist() == [0, 1, 2] * 3
    assert scores[1].tolist() == [0.0] * 3 and scores.dtype == torch.float32


def test_an_interrupted_file_leaves_the_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "scores.parquet"
    with ScoreFile(path, schema(3, METADATA)) as file:
        file.write(some(0, 3))
    with pytest.raises(ZeroDivisionError), ScoreFile(path, schema(3, METADATA)) as file:
        file.write(some(0, 5))
        raise ZeroDivisionError
    assert len(pq.read_table(path)) == 3 and list(tmp_path.iterdir()) == [path]


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    count = 2000
    values = rng.random(count * 710, dtype=np.float32)
    scores = pa.FixedSizeListArray.from_arrays(pa.array(values), 710)

    def rows(first: int) -> pa.Table:
        ids = np.arange(first, first + count)
        columns = {
            "row": ids,
            "path": [f"/data/kinetics/val/{n:09d}.mp4" for n in ids],
            "label": pa.array(ids % 710, pa.int32()),
            "prediction": pa.array(ids % 710, pa.int32()),
            "correct_top5": pa.array(ids % 2 == 0),
            "scores": scores,
            "reason": pa.nulls(count, pa.string()),
        }
        return pa.table(columns, schema=schema(710))

    with ScoreFile(tmp_path / "scores.parquet", schema(710, METADATA)) as file:
        for number in range(8):
            file.write(rows(number * count))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(8, 38):
            file.write(rows(number * count))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 20 * 1024  # KiB; these are 162 MiB of scores
    with pq.ParquetFile(tmp_path / "scores.parquet") as written:
        groups = [written.metadata.row_group(n).num_rows for n in range(written.num_row_groups)]
    assert sum(groups) == 76_000 and max(groups) <= module.most_rows(710) + count


def test_an_evaluation_continues_after_its_parts(tmp_path: Path) -> None:
    folder = EvaluationDir(tmp_path)
    folder.prepare(IDENTITY, again=False)
    folder.write(some(0, 4, bad=(1, 2)))
    folder.write(some(4, 6))
    assert (folder.done, folder.bad) == (6, 2)
    folder.write(some(8, 9))  # after a gap
    (tmp_path / "parts" / ".000.parquet.partial").write_bytes(b"half")
    again = EvaluationDir(tmp_path)
    again.prepare(IDENTITY, again=False)
    assert (again.done, again.bad) == (6, 2) and not again.is_finished(IDENTITY)
    assert list(again.bad_videos()) == [(1, "v1.mp4", "is cut off"), (2, "v2.mp4", "is cut off")]
    assert len(list((tmp_path / "parts").iterdir())) == 2
    with pytest.raises(RunError, match="clips: 2 there, 4 now"):
        EvaluationDir(tmp_path).prepare({**IDENTITY, "clips": 4}, again=False)
    (tmp_path / "identity.json").unlink()  # as --again leaves it when it is killed
    other = EvaluationDir(tmp_path)
    other.prepare({**IDENTITY, "clips": 4}, again=False)
    assert other.done == 0
    other.write(some(0, 4))
    other.prepare({**IDENTITY, "clips": 2}, again=True)
    assert other.done == 0
    other.result.write_text("{}")
    assert other.is_finished(IDENTITY) and not other.is_finished({**IDENTITY, "clips": 4})
    (tmp_path / "identity.json").unlink()
    with pytest.raises(RunError, match="--again"):
        EvaluationDir(tmp_path).prepare(IDENTITY, again=False)


def test_a_runs_own_scores_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").touch()
    with pytest.raises(RunError, match="--out"):
        EvaluationDir(tmp_path).prepare(IDENTITY, again=True)
    assert [path.name for path in tmp_path.iterdir()] == ["events.jsonl"]


def test_a_damaged_part_is_named(tmp_path: Path) -> None:
    folder = EvaluationDir(tmp_path)
    folder.prepare(IDENTITY, again=False)
    folder.write(some(0, 4))
    (part,) = folder.parts()
    part.write_bytes(part.read_bytes()[:-9])
    with pytest.raises(RunError, match=part.name):
        EvaluationDir(tmp_path).prepare(IDENTITY, again=False)
    with pytest.raises(RunError, match=part.name):
        list(folder.read(part))


def gathered(first: int) -> list[int] | None:
    """Seven videos in batches of two, from a row on: the rows that rank 0 gets, in their order."""
    import torch.distributed as dist

    rank, world_size = dist.get_rank(), dist.get_world_size()
    sampler = ViewSampler(7, 2, world_size)
    dataset = mock.Mock(printable_path=lambda row: f"v{row}.mp4")
    gatherer = ScoreGatherer(dataset, 2, 3, first)
    bad_samples = BadSamples(videos={5: BadSample(5, "v5.mp4", "is empty")})
    for number in range(first // (2 * world_size), sampler.batches):
        ids = torch.tensor([sampler.sample(rank, number, place) for place in range(2)])
        labels = torch.where(ids >= 0, ids % 3, -1)
        scores = torch.nn.functional.one_hot(labels.clamp(min=0), 3).float()
        batch = ClipBatch(torch.zeros(2), labels, ids, (ids >= 0) & (ids != 5), torch.zeros(2))
        gatherer.add(batch, scores)
    table = gatherer.gather(bad_samples)
    assert gatherer.gather(bad_samples) is None  # nothing was added since
    assert (table is None) == (rank > 0)
    if table is None:
        return None
    assert table["reason"].to_pylist() == [
        "is empty" if row == 5 else None for row in table["row"].to_pylist()
    ]
    assert table["path"][0].as_py() == f"v{first}.mp4"
    assert [p for p in table["prediction"].to_pylist() if p is not None] == [
        row % 3 for row in table["row"].to_pylist() if row != 5
    ]
    rows: list[int] = table["row"].to_pylist()
    return rows


@pytest.mark.parametrize("world_size", [1, 2])
def test_rank_0_gets_all_rows_in_order(world_size: int) -> None:
    with Ranks(world_size) as ranks:
        for first in (0, 3):
            assert ranks.run(gathered, first)[0] == list(range(first, 7))
