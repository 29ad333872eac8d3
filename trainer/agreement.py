"""Doing something on all ranks, and failing on all of them where one fails."""

from collections.abc import Callable
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
