"""Drop-path drops clips, not tokens, and keeps the mean."""

import pytest
import torch

from models.drop import DropPath, linear_rates


def test_whole_clips_are_dropped_and_the_mean_is_kept():
    branch = torch.randn(20_000, 2, 3)
    dropped = DropPath(0.25)(branch)
    was_dropped = (dropped == 0).flatten(1)
    assert torch.equal(was_dropped.all(1), was_dropped.any(1))
    assert was_dropped.all(1).float().mean().item() == pytest.approx(0.25, abs=0.015)
    kept = ~was_dropped.all(1)
    torch.testing.assert_close(dropped[kept], branch[kept] / 0.75)


@pytest.mark.parametrize(("rate", "training"), [(0.5, False), (0.0, True)])
def test_evaluation_and_rate_zero_change_nothing(rate, training):
    branch = torch.randn(4, 3)
    assert DropPath(rate).train(training)(branch) is branch


def test_rates_grow_linearly_from_zero():
    assert linear_rates(0.4, 5) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert linear_rates(0.4, 1) == [0]
    assert linear_rates(0.4, 0) == []


def test_the_model_uses_the_rates_of_its_config(small):
    model = small(depth=3, drop_path=0.2, global_layers=(1, 2), global_drop_path=0.4)
    assert [block.drop_path.rate for block in model.blocks] == pytest.approx([0, 0.1, 0.2])
    assert [block.drop_path.rate for block in model.fusion.blocks] == pytest.approx([0, 0.4])


def test_a_dropped_clip_skips_the_branches_of_a_block(small):
    block = small("temporal").blocks[1].train()
    block.drop_path.rate = 0.999999
    tokens = torch.randn(2, 2, 5, 16)
    assert torch.equal(block(tokens), tokens)
