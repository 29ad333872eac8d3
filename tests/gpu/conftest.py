"""Fixtures of tests that need a GPU."""

from collections.abc import Iterator

import pytest
import torch

from tests.trainer.ranks import Ranks


@pytest.fixture(scope="module")
def rank(device: torch.device) -> Iterator[Ranks]:
    """One rank in a process of its own: what breaks its GPU's context breaks no other module's."""
    with Ranks(1, device.type) as one:
        yield one
