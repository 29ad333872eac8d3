"""A compiled model under the engine."""

from functools import partial

import pytest
import torch

from tests.gpu.test_precision import NEAR, losses
from tests.trainer.ranks import Ranks

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("stage", "recomputed_blocks"), [(1, 0), (2, 2)])
def test_a_compiled_model_gives_the_losses_of_the_eager_one(
    rank: Ranks, stage: int, recomputed_blocks: int
) -> None:
    how = {"form": "scene", "recomputed_blocks": recomputed_blocks}
    (compiled,), (eager,) = (
        rank.run(partial(losses, compile=compile, **how), stage, "bf16") for compile in (True, False)
    )
    torch.testing.assert_close(compiled, eager, atol=NEAR, rtol=0)
