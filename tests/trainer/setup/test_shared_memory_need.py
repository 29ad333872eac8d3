"""The need of all ranks of a node against its free /dev/shm."""

from dataclasses import replace

import pytest

from pipelines.dali.shared_memory import SharedMemoryNeed
from trainer.errors import AgreedError
from trainer.setup.shared_memory import RankShare, check_shares
from trainer.system.host import SharedMemory

MIB = 2**20
DOCKER = SharedMemory(64 * MIB, 64 * MIB, device=1)
RANK = RankShare("n1", DOCKER, SharedMemoryNeed(10 * MIB, 20 * MIB), SharedMemoryNeed(15 * MIB, 15 * MIB))


def test_ranks_of_a_node_share_its_shared_memory() -> None:
    assert check_shares([RANK]) is None
    with pytest.raises(AgreedError) as caught:
        check_shares([replace(RANK, node="n0"), *[RANK] * 3])
    text = str(caught.value)
    assert "/dev/shm of node n1 is too small: 64 MiB" in text
    assert "75 MiB: 30 MiB for training and 45 MiB for evaluation" in text
    assert "--shm-size=1g" in text and "--ipc=host" in text and "data.prefetch" in text


def test_ranks_in_separate_containers_do_not_share_it() -> None:
    assert check_shares([RANK, replace(RANK, there=replace(DOCKER, device=2))]) is None


def test_the_possible_need_of_large_videos_is_a_note() -> None:
    note = check_shares([RANK, RANK])
    assert note is not None and "70 MiB" in note and "large videos" in note


def test_a_system_without_a_limit_has_no_note() -> None:
    assert check_shares([replace(RANK, there=None)] * 9) is None


def test_reading_this_machine() -> None:
    there = SharedMemory.read()
    assert there is None or 0 <= there.free <= there.total
