"""Counts of an evaluation over all ranks, and nonfinite outputs."""

import math
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from pipelines.loader import ClipBatch
from tests.trainer.ranks import Ranks
from trainer.errors import AgreedError
from trainer.evaluation.multi_view import EvaluationResult, evaluate

LABELS = torch.tensor([0, 1, 2, 2])


def evaluated(logits: torch.Tensor, valid: list[bool]) -> EvaluationResult | None:
    """An evaluation of four videos of one view each. logits: (4, 3)."""
    clips, numbers = torch.zeros(4, 1, 3, 1, 1, 1), torch.arange(4)
    batch = ClipBatch(clips, LABELS, numbers, torch.tensor(valid), numbers)
    engine = mock.Mock(device=torch.device("cpu"), forward=lambda _: logits)
    return evaluate(engine, [batch], 3, at_once=9, progress=lambda _: None, stop_requested=lambda: False)  # type: ignore[arg-type]


def check_counts() -> None:
    logits = torch.eye(3)[[0, 1, 2, 0]]
    result = evaluated(logits, [True] * 4)
    assert result is not None
    assert (result.videos, result.bad, result.top1, result.top5) == (4, 0, 0.75, 1.0)
    logits[1, 2] = math.nan
    with pytest.raises(AgreedError, match="not finite for 1 of 4 validation videos"):
        evaluated(logits, [True] * 4)
    logits[1, 2] = math.inf
    with pytest.raises(AgreedError, match="not finite for 1 of 4 validation videos"):
        evaluated(logits, [True] * 4)
    left_out = evaluated(logits, [True, False, True, True])  # outputs of a bad video do not count
    assert left_out is not None and (left_out.videos, left_out.bad) == (3, 1)


def test_nonfinite_outputs_are_an_error() -> None:
    with Ranks(1) as alone:
        alone.run(check_counts)


def counted_on_two_ranks() -> tuple[list[list[int]], float, float, int, int]:
    """Classes 0 1 2 2 on both ranks; rank 0 predicts all of them right, rank 1 predicts 1 1 0 2."""
    logits = torch.eye(3)[[0, 1, 2, 2] if dist.get_rank() == 0 else [1, 1, 0, 2]]
    result = evaluated(logits, [True, True, dist.get_rank() == 0, True])
    assert result is not None
    return result.confusion.tolist(), result.top1, result.top5, result.videos, result.bad


def test_counts_are_summed_over_ranks() -> None:
    # Rank 1's third video is bad. By hand: 7 videos, 6 right.
    with Ranks(2) as ranks:
        for found in ranks.run(counted_on_two_ranks):
            assert found == ([[1, 1, 0], [0, 2, 0], [0, 0, 3]], 6 / 7, 1.0, 7, 1)
