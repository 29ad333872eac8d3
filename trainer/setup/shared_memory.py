"""Checks that /dev/shm can hold the prefetched batches of a node: a container has 64 MiB by default."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from pipelines.dali.shared_memory import SharedMemoryNeed
from trainer.distributed.collectives import gather
from trainer.distributed.environment import Environment
from trainer.errors import AgreedError
from trainer.system.formatting import format_bytes
from trainer.system.host import SharedMemory

_ADVICE = (
    "In a container, start it with --shm-size={size}g or --ipc=host (Kubernetes: an emptyDir of "
    "medium Memory at /dev/shm); or lower {settings}"
)


@dataclass(frozen=True)
class RankShare:
    """Shared memory that one rank needs, and that its node has."""

    node: str
    there: SharedMemory | None
    """The node's /dev/shm; None where it has none or no limit."""
    train: SharedMemoryNeed
    val: SharedMemoryNeed


def check_shared_memory(
    environment: Environment, train: SharedMemoryNeed, val: SharedMemoryNeed
) -> str | None:
    """Compare the need of all ranks of each node with the free /dev/shm, before any batch. Collective.

    Returns a note where /dev/shm may become too small. Raises AgreedError on all ranks where it is too small
    on any node.
    """
    return check_shares(gather(RankShare(environment.node, SharedMemory.read(), train, val)))


def check_shares(shares: Sequence[RankShare]) -> str | None:
    """As `check_shared_memory`, from the shares of all ranks. The message names the node that lacks most."""
    nodes: dict[tuple[str, int], list[RankShare]] = {}
    for share in shares:
        if share.there is not None:
            nodes.setdefault((share.node, share.there.device), []).append(share)
    if not nodes:
        return None
    worst = max(nodes.values(), key=lambda ranks: _lack(ranks, least=True))
    if _lack(worst, least=True) > 0:
        more = sum(_lack(ranks, least=True) > 0 for ranks in nodes.values()) - 1
        others = f" ({more} more node{'s' if more > 1 else ''} likewise)" if more else ""
        raise AgreedError(f"/dev/shm of {_describe(worst, least=True)}{others}. {_advice(worst)}")
    worst = max(nodes.values(), key=lambda ranks: _lack(ranks, least=False))
    if _lack(worst, least=False) > 0:
        return (
            f"/dev/shm of {_describe(worst, least=False)}, once large videos come together. {_advice(worst)}"
        )
    return None


def _need(ranks: Sequence[RankShare], *, least: bool) -> tuple[int, int]:
    """Bytes for training and for evaluation."""
    return (
        sum(share.train.least if least else share.train.most for share in ranks),
        sum(share.val.least if least else share.val.most for share in ranks),
    )


def _free(ranks: Sequence[RankShare]) -> int:
    return min(share.there.free for share in ranks if share.there is not None)


def _lack(ranks: Sequence[RankShare], *, least: bool) -> int:
    return sum(_need(ranks, least=least)) - _free(ranks)


def _describe(ranks: Sequence[RankShare], *, least: bool) -> str:
    train, val = _need(ranks, least=least)
    there = ranks[0].there
    assert there is not None
    whose = f"{len(ranks)} ranks" if len(ranks) > 1 else "one rank"
    return (
        f"node {ranks[0].node} is too small: {format_bytes(there.total, 2)}, of which "
        f"{format_bytes(_free(ranks), 2)} are free. "
        f"The prefetched batches of {whose} need{'' if least else ' up to'} "
        f"{format_bytes(train + val, 2)}: {format_bytes(train, 2)} for training and "
        f"{format_bytes(val, 2)} for evaluation"
    )


def _advice(ranks: Sequence[RankShare]) -> str:
    train, val = _need(ranks, least=False)
    used = max(0, max(share.there.total - share.there.free for share in ranks if share.there is not None))
    settings = ["data.prefetch", "data.workers"]
    settings.insert(0 if val > train else 2, "evaluation.batch or evaluation.clips")
    return _ADVICE.format(size=ceil((train + val + used) * 1.1 / 2**30), settings=", ".join(settings))
