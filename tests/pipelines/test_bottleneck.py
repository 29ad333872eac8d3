"""What clips cost in each stage, and which stage is the bottleneck."""

import time
from dataclasses import replace

import pytest
import torch

from pipelines.bottleneck import StageCosts, find_bottleneck, thread_seconds
from pipelines.dali.pipeline import LoaderResources
from tests.conftest import MotionSet
from tests.pipelines.batches import ALL, loader

RESOURCES = LoaderResources(torch.device("cpu"), workers=4, threads=2, prefetch=2)
SECONDS = 100.0  # four workers have 400 CPU seconds and two threads 200


@pytest.mark.parametrize(
    ("costs", "wait_share", "cores", "stage"),
    [
        (StageCosts(read=390, decode=5), 0.04, 6, "model"),
        (StageCosts(read=300, decode=80), 0.4, 6, "read"),
        (StageCosts(read=80, decode=300), 0.4, 6, "decode"),
        (StageCosts(decode=100, augment=190), 0.4, 6, "augment"),
        (StageCosts(decode=100, augment=50, transfer=90), 0.4, 6, "transfer"),
        (StageCosts(decode=100, augment=70), 0.4, 2, "cores"),
        (StageCosts(decode=100, augment=70), 0.4, 8, "latency"),
    ],
)
def test_the_busiest_stage_is_the_bottleneck(
    costs: StageCosts, wait_share: float, cores: int, stage: str
) -> None:
    found = find_bottleneck(costs, SECONDS, wait_share, RESOURCES, cores)
    assert found.stage == stage
    assert (found.advice == "") == (stage == "model")


def test_with_idle_stages_the_gpu_is_the_bottleneck() -> None:
    on_gpu = replace(RESOURCES, device=torch.device("cuda", 0))
    assert find_bottleneck(StageCosts(decode=100, augment=50), SECONDS, 0.4, on_gpu, 8).stage == "device"


def test_costs_per_clip_are_in_milliseconds() -> None:
    spent = StageCosts(clips=30, read=3.0, decode=6.0, augment=0.5, transfer=0.25)
    before = StageCosts(clips=10, read=1.0, decode=2.0, augment=0.5, transfer=0.05)
    per_clip = (spent - before).per_clip()
    assert per_clip == pytest.approx({"read": 100.0, "decode": 200.0, "augment": 0.0, "transfer": 10.0})
    assert spent - before + before == spent


def test_a_loader_counts_what_its_clips_cost(motion_set: MotionSet) -> None:
    """CPU time of its workers and of DALI's threads; a closed loader keeps its counts."""
    clips = loader(motion_set.train, ALL, batch=16)
    for _ in zip(range(8), clips, strict=False):
        pass
    costs = clips.costs
    assert costs.clips == 128
    assert costs.read > 0
    assert costs.decode > 0
    assert costs.augment > 0
    assert costs.transfer == 0  # a CPU copies nothing
    clips.close()
    assert clips.costs.augment >= costs.augment


def test_the_time_of_a_loaders_threads_is_counted(motion_set: MotionSet) -> None:
    known = thread_seconds().keys()
    clips = loader(motion_set.train, ALL, batch=16)
    threads = thread_seconds().keys() - known
    assert threads
    next(iter(clips))
    first = sum(thread_seconds()[each] for each in threads)
    for _ in zip(range(8), clips, strict=False):
        pass
    time.sleep(0.05)
    assert sum(thread_seconds()[each] for each in threads) > first
    clips.close()
    deadline = time.monotonic() + 10  # the kernel lists a thread for a moment after it was joined
    while not threads.isdisjoint(thread_seconds()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threads.isdisjoint(thread_seconds())
