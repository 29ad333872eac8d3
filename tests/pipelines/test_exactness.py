"""Batches are bit-identical for any number of ranks and workers, and from any step on."""

import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipelines.dali.external_source import TrainSource
from pipelines.dali.sample_reader import Decoding, SampleReader
from pipelines.dataset.concat import Dataset
from pipelines.decode.pyav import decode_frames
from pipelines.sampling.sampler import TrainSampler
from tests.conftest import MotionSet
from tests.pipelines.batches import ALL, digests, loader, options, take

STEPS = range(10, 13)  # an epoch has four: the last is of the fourth epoch
BATCH = 8


@pytest.fixture(scope="module")
def reference(motion_set: MotionSet, device: torch.device) -> list[str]:
    """Digests of the global batches of STEPS, made by one rank with one worker that started there."""
    how = options(device=device)
    return digests(take(loader(motion_set.train, ALL, batch=BATCH, first_step=STEPS[0], how=how), len(STEPS)))


def test_a_start_at_step_11_gives_the_batches_of_a_run_from_the_beginning(
    motion_set: MotionSet, reference: list[str], device: torch.device
) -> None:
    from_zero = take(loader(motion_set.train, ALL, batch=BATCH, how=options(workers=2, device=device)), 12)
    assert digests(from_zero)[10:12] == reference[:2]
    later = take(loader(motion_set.train, ALL, batch=BATCH, first_step=11, how=options(device=device)), 2)
    assert digests(later) == reference[1:]
    assert len(set(reference)) == len(reference)


@pytest.mark.parametrize(
    ("ranks", "micro", "workers"),
    [
        (2, 2, 2),
        *(
            pytest.param(*case, marks=pytest.mark.soak)
            for case in ((1, 8, 4), (1, 2, 1), (2, 2, 4), (4, 2, 1), (2, 4, 1), (4, 1, 4))
        ),
    ],
)
def test_ranks_workers_and_accumulation_change_nothing(
    motion_set: MotionSet, reference: list[str], ranks: int, micro: int, workers: int, device: torch.device
) -> None:
    accumulation = BATCH // (ranks * micro)
    count = len(STEPS) * accumulation
    parts = [
        take(
            loader(
                motion_set.train, ALL, batch=BATCH, micro=micro, rank=rank, ranks=ranks, first_step=STEPS[0],
                how=options(workers=workers, prefetch=workers, device=device),
            ),
            count,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    # a global batch is laid out accumulation-major, then rank
    merged = [
        [parts[rank][step * accumulation + index] for index in range(accumulation) for rank in range(ranks)]
        for step in range(len(STEPS))
    ]
    assert [digests([group])[0] for group in merged] == reference


def test_after_sigkill_the_next_process_continues_with_the_same_batches(
    motion_set: MotionSet, reference: list[str], device: torch.device
) -> None:
    """The process and its workers die in the middle of a batch; another begins at the next step."""
    killed = _start(motion_set.train, STEPS[0], device)
    assert killed.stdout is not None
    before = [killed.stdout.readline().strip() for _ in range(2)]
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(60) == -signal.SIGKILL
    after = _start(motion_set.train, STEPS[2], device)
    assert after.stdout is not None
    resumed = after.stdout.readline().strip()
    after.kill()
    after.wait(60)
    assert [*before, resumed] == reference


def _start(manifest: Path, first_step: int, device: torch.device) -> "subprocess.Popen[str]":
    """A process that prints the digest of each batch."""
    arguments = str(manifest), str(first_step), str(device)
    command = [sys.executable, "-m", "tests.pipelines.print_digests", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])


def test_repeats_are_adjacent_and_decoded_once(motion_set: MotionSet, device: torch.device) -> None:
    """The first repeat is the clip of a loader without repeats; half as many samples are read."""
    repeated = loader(motion_set.train, ALL, batch=8, repeats=2, how=options(device=device))
    batches = [batch for _, batch in zip(range(4), repeated, strict=False)]
    assert repeated.costs.clips == 32
    repeated.close()
    single = take(loader(motion_set.train, ALL, batch=8, how=options(device=device)), 2)
    clips, ids = torch.cat([b.clips for b in batches]), torch.cat([b.ids for b in batches])
    assert torch.equal(ids[0::2], ids[1::2])
    assert torch.equal(ids[0::2], torch.cat([batch.ids for batch in single]))
    assert torch.equal(clips[0::2], torch.cat([batch.clips for batch in single]))
    keys = torch.cat([batch.keys for batch in batches])
    assert torch.equal(keys[0::2], torch.cat([batch.keys for batch in single]))
    assert len(keys.unique()) == len(keys)
    assert not any(torch.equal(one, other) for one, other in zip(clips[0::2], clips[1::2], strict=True))


def test_the_decoder_is_called_once_for_all_repeats(
    motion_set: MotionSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def counting(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments)
        return decode_frames(*arguments, **named)

    monkeypatch.setattr("pipelines.dataset.source.decode_frames", counting)
    dataset = Dataset.open([motion_set.train])
    sampler = TrainSampler(len(dataset), 12, seed=3, repeats=3)
    source = TrainSource(
        SampleReader(dataset, Decoding("pyav")), sampler, ALL, 12, rank=0, world_size=1, first=0
    )
    for position in range(source.samples):
        source(SimpleNamespace(idx_in_epoch=position))
    assert len(calls) == 4  # for twelve clips


def test_repeats_do_not_depend_on_ranks(motion_set: MotionSet) -> None:
    whole = take(loader(motion_set.train, ALL, batch=8, repeats=2), 1)
    parts = [
        take(loader(motion_set.train, ALL, batch=8, micro=4, rank=rank, ranks=2, repeats=2), 1)[0]
        for rank in (0, 1)
    ]
    assert digests([parts]) == digests(whole)


def test_a_micro_batch_must_not_divide_repeats(motion_set: MotionSet) -> None:
    with pytest.raises(ValueError, match="2 repeats"):
        loader(motion_set.train, ALL, batch=8, micro=1, repeats=2)
