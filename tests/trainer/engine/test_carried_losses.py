"""Twenty steps in fp32 on either device: the losses that a CPU computed once."""

from collections.abc import Iterator

import pytest
import torch

from tests.trainer.engine.carried_losses import FORMS, STEPS, carried, losses
from tests.trainer.ranks import Ranks

# Weights that differ by 1e-6 of themselves change the losses of 20 steps by 1.4e-6. A GPU sums in another
# order; with TF32 the errors are about 1e-3.
NEAR = {"cpu": 1e-5, "cuda": 1e-4}


@pytest.fixture(scope="module")
def one(device: torch.device) -> Iterator[Ranks]:
    with Ranks(1, device.type) as rank:
        yield rank


@pytest.mark.parametrize("form", FORMS)
def test_twenty_steps_give_the_carried_losses(one: Ranks, form: str, device: torch.device) -> None:
    (found,) = one.run(losses, form)
    assert len(set(found)) == STEPS
    torch.testing.assert_close(found, carried(form), atol=NEAR[device.type], rtol=0)
