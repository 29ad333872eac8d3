"""Scores of videos do not depend on how many views a forward pass computes."""

import pytest
import torch
from torch import Tensor

from trainer.errors import RunError
from trainer.inference.view_scores import view_scores


@pytest.mark.parametrize(
    ("at_once", "passes"), [(12, [12]), (100, [12]), (11, [6, 6]), (5, [4, 4, 4]), (1, [1] * 12)]
)
def test_views_are_computed_in_passes_of_bounded_size(at_once: int, passes: list[int]) -> None:
    clips = torch.randn(3, 4, 3, 2, 1, 1)
    seen: list[int] = []

    def forward(part: Tensor) -> Tensor:
        seen.append(len(part))
        return 5 * part.flatten(1)

    scores = view_scores(forward, clips, at_once, reduce_by="")
    assert seen == passes
    assert torch.equal(scores, (5 * clips.flatten(2)).softmax(dim=-1).mean(dim=1))


def test_too_little_memory_names_what_to_reduce() -> None:
    def forward(part: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("Tried to allocate 2 GiB.\nmore")

    with pytest.raises(RunError, match=r"2 videos of 3 views.*allocate 2 GiB\. Lower --batch") as caught:
        view_scores(forward, torch.zeros(2, 3, 3, 1, 1, 1), 4, reduce_by="Lower --batch")
    assert "more" not in str(caught.value)
