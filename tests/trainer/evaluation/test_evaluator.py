"""An evaluation of 16 videos whose clips are given: no run, no decoding."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from models import create_model
from pipelines.bad_samples import BadSamples
from pipelines.dataset.manifest import Manifest
from pipelines.loader import ClipBatch
from tests.conftest import MotionSet
from tests.trainer.ranks import Ranks
from trainer.checkpoint.weights import save_weights
from trainer.distributed.environment import find_environment
from trainer.evaluation import evaluator
from trainer.evaluation.evaluation_dir import EvaluationDir
from trainer.evaluation.target import EvaluationRequest, resolve_target
from trainer.inference.preprocessing import Preprocessing

BATCH = 3
VIEWS = 2


class Clips:
    """A loader of 16 videos of noise."""

    bad_samples = BadSamples()
    resources = mock.Mock(summary="")

    def __iter__(self) -> Iterator[ClipBatch]:
        for first in range(0, 16, BATCH):
            ids = torch.arange(first, first + BATCH)
            ids[ids >= 16] = -1
            yield ClipBatch(torch.randn(BATCH, VIEWS, 3, 2, 16, 16), ids % 8, ids, ids >= 0, 0 * ids)


def evaluate(weights: Path, manifest: Path, folder: Path, views_per_pass: int) -> list[tuple[int, int]]:
    """The videos evaluated when a part is written, and the most views of a forward pass until then."""
    environment = find_environment("cpu")
    request = EvaluationRequest(weights, manifest=manifest, clips=VIEWS, batch=BATCH, out=folder)
    target = resolve_target(request, environment)
    written: list[tuple[int, int]] = []
    passes: list[int] = []
    write, forward = EvaluationDir.write, target.weights.model.forward

    def note_part(self: EvaluationDir, rows: pa.Table) -> None:
        write(self, rows)
        written.append((self.done, max(passes)))

    def note_pass(clips: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        passes.append(len(clips))
        return forward(clips, keys)

    with (
        mock.patch.object(evaluator, "open_view_loader", lambda *_, **__: (Clips(), [])),
        mock.patch.object(evaluator, "views_at_once", lambda *_: views_per_pass),
        mock.patch.object(evaluator, "write_report"),
        mock.patch.object(evaluator, "print_result"),
        mock.patch.object(EvaluationDir, "write", note_part),
        mock.patch.object(target.weights.model, "forward", note_pass),
    ):
        assert evaluator.Evaluator(target, environment, as_json=True).evaluate(again=False) == 0
    return written


def test_all_videos_are_evaluated_whatever_the_views_of_a_pass(motion_set: MotionSet, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model(
        "tiny", form="scene", resolution=16, width=16, depth=2, heads=2, frames=2, num_classes=8
    )
    description = {
        "model": asdict(model.config),
        "class_names": list(Manifest.open(motion_set.val).class_names),
        "preprocessing": Preprocessing(2, 16, (0.45,) * 3, (0.225,) * 3, VIEWS, 1).as_metadata(),
        "recipe": {},
    }
    weights = tmp_path / "weights.safetensors"
    save_weights(weights, model.state_dict(), description)
    with Ranks(1) as alone:
        for per_pass, largest in ((1, 1), (100, BATCH * VIEWS)):
            folder = tmp_path / str(per_pass)
            (parts,) = alone.run(evaluate, weights, motion_set.val, folder, per_pass)
            assert parts == [(16, largest)]  # one part, of all videos
            assert pq.read_table(folder / "scores.parquet")["row"].to_pylist() == list(range(16))
