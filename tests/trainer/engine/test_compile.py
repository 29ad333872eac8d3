"""A compiled model under a real DeepSpeed: one graph for all passes, statistics counted once."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import pytest
import torch
from torch._dynamo.utils import counters

from tests.trainer.checkpoint.training import make_engine, train
from tests.trainer.ranks import Ranks
from trainer.builder import dry_run_batch


@contextmanager
def compiled_by(backend: str) -> Iterator[None]:
    """Engines made inside compile with this backend of torch's, which needs no C++ compiler."""
    with mock.patch.object(torch, "compile", partial(torch.compile, backend=backend)):
        yield


def compiled_and_plain(backend: str, recomputed_blocks: int) -> tuple[int, float, float]:
    """Graphs that a dry-run batch and two steps make; the largest difference in losses, and in statistics."""
    plain = make_engine(1)
    with compiled_by(backend):
        compiled = make_engine(1, compile=True, recomputed_blocks=recomputed_blocks)
    torch._dynamo.reset()
    counters.clear()
    dry_run_batch(compiled, torch.randn(compiled.micro_batch, 3, 4, 16, 16), 4)
    losses = zip(train(plain, 0, 2), train(compiled, 0, 2), strict=True)
    statistics = zip(plain.model.buffers(), compiled.model.buffers(), strict=True)
    return (
        counters["stats"]["unique_graphs"],
        max(abs(one - other) for one, other in losses),
        max(float((one - other).abs().max()) for one, other in statistics),
    )


@pytest.mark.soak  # tests/models/test_uniformerv2.py compiles the model alone
@pytest.mark.parametrize(
    ("ranks", "backend", "recomputed_blocks"),
    [
        (1, "eager", 0),
        (2, "aot_eager_decomp_partition", 2),
    ],
)
def test_a_dry_run_batch_and_the_steps_share_one_graph(
    ranks: int, backend: str, recomputed_blocks: int
) -> None:
    with Ranks(ranks) as processes:
        for graphs, losses, statistics in processes.run(compiled_and_plain, backend, recomputed_blocks):
            assert graphs == 1
            assert losses < 1e-5
            assert statistics < 1e-5
