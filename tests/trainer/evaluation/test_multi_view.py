"""What an evaluation counts, and what it refuses to count."""

import math
from unittest import mock

import pytest
import torch

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
    return evaluate(engine, [batch], 3, progress=lambda _: None, stop_requested=lambda: False)  # type: ignore[arg-type]


def both() -> None:
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
    left_out = evaluated(logits, [True, False, True, True])  # a bad video's outputs are no one's
    assert left_out is not None and (left_out.videos, left_out.bad) == (3, 1)


def test_outputs_that_are_not_finite_are_no_result() -> None:
    with Ranks(1) as alone:
        alone.run(both)
