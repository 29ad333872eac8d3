"""Collectives on Python objects: errors raised on all ranks, broadcast, comparison between ranks."""

import hashlib
from collections.abc import Callable
from itertools import zip_longest
from typing import TypeVar

import torch.distributed as dist

from models import ModelError
from pipelines.errors import DataError
from trainer.errors import AgreedError, UserError
from trainer.system.formatting import format_ranks

T = TypeVar("T")


def run_on_all_ranks(work: Callable[[], T]) -> T:
    """Do `work` on every rank. Collective.

    `work` contains no collective: a rank that fails would leave the others waiting in it. Raises AgreedError
    on every rank where `work` failed on any, with each rank's message. Only UserError, DataError and
    ModelError are gathered; other exceptions end their rank at once.
    """
    result, problem = None, None
    try:
        result = work()
    except (UserError, DataError, ModelError) as error:
        problem = str(error)
    ranks: dict[str, list[int]] = {}
    for rank, text in enumerate(gather(problem)):
        if text is not None:
            ranks.setdefault(text, []).append(rank)
    if not ranks:
        return result  # type: ignore[return-value]
    if len(ranks) == 1:
        raise AgreedError(next(iter(ranks)))
    raise AgreedError("\n".join(f"rank {', '.join(map(str, who))}: {text}" for text, who in ranks.items()))


def gather(value: T) -> list[T]:
    """The values of all ranks, in the order of ranks. Collective."""
    values = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_distinct(text: str | None) -> tuple[str, ...]:
    """The texts of all ranks that have one, each once and sorted. Collective."""
    return tuple(sorted({found for found in gather(text) if found is not None}))


def find_first(problem: str | None) -> str | None:
    """The problem of the lowest rank that has one; None where no rank has. Collective."""
    return next((text for text in gather(problem) if text is not None), None)


def broadcast_from_main(value: T) -> T:
    """Rank 0's value on all ranks. Collective."""
    given = [value]
    dist.broadcast_object_list(given)
    return given[0]


def check_same_on_all_ranks(name: str, text: str) -> None:
    """Compare a text that each rank has read itself. Collective.

    Raises AgreedError on every rank where ranks differ from rank 0, with these ranks and the first line in
    which they differ.
    """
    digests = gather(hashlib.sha256(text.encode()).hexdigest())
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if not others:
        return
    of_each = gather(_first_difference(broadcast_from_main(text), text))
    raise AgreedError(
        f"{name} differs on {format_ranks(others)} from rank 0: {of_each[others[0]]}; it changed "
        "while the ranks read it, or they read different files; start again"
    )


def _first_difference(one: str, other: str) -> str | None:
    """The first line in which two texts differ, from both of them; None where they are equal."""
    for before, after in zip_longest(one.splitlines(), other.splitlines(), fillvalue="nothing"):
        if before != after:
            return f"`{after.strip()[:200]}` and not `{before.strip()[:200]}`"
    return None
