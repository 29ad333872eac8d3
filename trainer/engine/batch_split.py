"""Divides the global batch over ranks and into micro-batches. Imports no torch: login nodes submit jobs."""

import math

from trainer.errors import RecipeError

_GROUPED = "clips that stay together (sampling.repeats, and pairs of augmentation.mixup or cutmix)"


def split_batch(
    global_batch: int, world_size: int, micro_batch_limit: int | None, group: int = 1
) -> tuple[int, int]:
    """The micro-batch and accumulation of each rank.

    Args:
        global_batch: clips per optimiser step over all ranks, repeats included.
        world_size: ranks.
        micro_batch_limit: most clips per rank in one forward pass; None for the rank's whole share.
        group: consecutive clips that are in one micro-batch, see `Recipe.clip_group`.

    Returns:
        `(micro_batch, accumulation)` with micro_batch * accumulation * world_size == global_batch and
        micro_batch the largest multiple of `group` within the limit.

    Raises:
        RecipeError: the division leaves a remainder, or the limit is below one group.
    """
    groups, remainder = divmod(global_batch, group)
    if remainder:
        raise RecipeError(
            f"optimisation.global_batch {global_batch} is no multiple of {group} {_GROUPED}; "
            f"nearest: {_either(_multiples_around(global_batch, group))}"
        )
    if groups % world_size:
        worlds = _divisors_around(groups, world_size)
        batches = _multiples_around(global_batch, world_size * group)
        grouped = f" x {group} {_GROUPED}" if group > 1 else ""
        raise RecipeError(
            f"optimisation.global_batch {global_batch} cannot be divided evenly over {world_size} "
            f"ranks{grouped}; possible near by: {_either(worlds)} ranks, "
            f"or a global batch of {_either(batches)}"
        )
    share = groups // world_size
    limit = share if micro_batch_limit is None else micro_batch_limit // group
    if limit < 1:
        raise RecipeError(
            f"engine.micro_batch {micro_batch_limit} does not hold {group} {_GROUPED}; allowed: {group} or "
            "more"
        )
    micro = max(size for size in range(1, min(limit, share) + 1) if share % size == 0)
    return micro * group, share // micro


def _divisors_around(number: int, wanted: int) -> list[int]:
    """The largest divisor of `number` below `wanted` and the smallest above, where there is one."""
    divisors = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    divisors = sorted({*divisors, *(number // size for size in divisors)})
    below = [size for size in divisors if size < wanted]
    above = [size for size in divisors if size > wanted]
    return below[-1:] + above[:1]


def _multiples_around(number: int, unit: int) -> list[int]:
    """The multiples of `unit` next to `number`, zero left out."""
    below = number // unit * unit
    return [multiple for multiple in (below, below + unit) if multiple]


def _either(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))
