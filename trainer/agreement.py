"""Doing something on all ranks, and failing on all of them where one fails."""

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TypeVar

import torch.distributed as dist

from models import ModelError
from pipelines import DataError
from trainer import RunError, UserError

T = TypeVar("T")


class AgreedError(RunError):
    """What some rank could not do, raised on all ranks with the same words: one of them is to show it."""


def together(work: Callable[[], T]) -> T:
    """Do `work` on this rank. Raises AgreedError on every rank when it failed on any, with all that was
    said. `work` holds no collective: a rank that fails would leave the others waiting in it.

    Only errors that a user can mend are gathered; a defect of the program ends its rank at once. Collective.
    """
    result, problem = None, None
    try:
        result = work()
    except (UserError, DataError, ModelError) as error:
        problem = str(error)
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    ranks: dict[str, list[int]] = {}
    for rank, text in enumerate(problems):
        if text is not None:
            ranks.setdefault(text, []).append(rank)
    if not ranks:
        return result  # type: ignore[return-value]
    if len(ranks) == 1:
        raise AgreedError(next(iter(ranks)))
    raise AgreedError("\n".join(f"rank {', '.join(map(str, who))}: {text}" for text, who in ranks.items()))


def ranks_in_words(ranks: Sequence[int]) -> str:
    """Ascending ranks in short: `rank 3`, `ranks 0-2, 4-7`."""
    return f"rank{'s' if len(ranks) > 1 else ''} {ranges(ranks)}"


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: `0-3, 7`."""
    runs = [list(run) for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0][1]) if len(run) == 1 else f"{run[0][1]}-{run[-1][1]}" for run in runs)
