"""The all-reduce of metrics after each step."""

import math

import torch
import torch.distributed as dist

from tests.trainer.ranks import Ranks
from trainer.distributed.step_sync import StepSums, StepSync, StepTotals


def exchange_two_steps() -> tuple[StepTotals | None, ...]:
    """In step 0 one of rank 0's four clips is bad; in step 1 all clips of both ranks are."""
    rank, sync = dist.get_rank(), StepSync(torch.device("cpu"))
    hashed = torch.tensor(2**40 + rank, dtype=torch.int64)
    first = sync.exchange(
        0,
        StepSums(torch.tensor(3.0 + 8 * rank), hashed),
        clips=4,
        bad=1 - rank,
        bad_samples=1 - rank,
        stop_requested=rank == 1,
        save_due=rank == 0,
        writing=rank == 1,
    )
    second = sync.exchange(
        1,
        StepSums(torch.tensor(0.0), hashed),
        clips=4,
        bad=4,
        bad_samples=0,
        stop_requested=False,
        save_due=False,
        writing=False,
    )
    return first, second, sync.read_pending(), sync.read_pending()


def test_totals_are_those_of_all_ranks_and_read_one_step_later() -> None:
    with Ranks(2) as two:
        one, other = two.run(exchange_two_steps)
    before, first, second, nothing = one
    assert before is None and nothing is None
    assert first == other[1]
    assert first == StepTotals(
        step=0,
        loss=(3 + 11) / 7,
        batch_hash=f"{2 * 2**40 + 1:016x}",
        clips=8,
        bad=1,
        bad_samples=1,
        stop_requests=1,
        save_due=True,
        writing=1,
    )
    assert second.step == 1 and math.isnan(second.loss) and (second.clips, second.bad) == (8, 8)
    assert (second.stop_requests, second.save_due, second.writing) == (0, False, 0)
