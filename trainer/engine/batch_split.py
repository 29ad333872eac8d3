"""Divides the global batch over ranks and into micro-batches. Imports no torch: login nodes submit jobs."""

import math

from trainer.errors import RecipeError


def split_batch(
    global_batch: int, world_size: int, micro_batch_limit: int | None, repeats: int = 1
) -> tuple[int, int]:
    """The micro-batch and accumulation of each rank.

    Args:
        global_batch: clips per optimiser step over all ranks, repeats included.
        world_size: ranks.
        micro_batch_limit: most clips per rank in one forward pass; None for the rank's whole share.
        repeats: augmentations per decoded clip; all are in one micro-batch, which decodes the clip once.

    Returns:
        `(micro_batch, accumulation)` with micro_batch * accumulation * world_size == global_batch and
        micro_batch the largest multiple of `repeats` within the limit.

    Raises:
        RecipeError: the division leaves a remainder, or the limit is below the repeats of one clip.
    """
    videos, remainder = divmod(global_batch, repeats)
    if remainder:
        raise RecipeError(
            f"optimisation.global_batch {global_batch} is no multiple of sampling.repeats {repeats}; "
            f"nearest: {_either(_multiples_around(global_batch, repeats))}"
        )
    if videos % world_size:
        worlds = _divisors_around(videos, world_size)
        batches = _multiples_around(global_batch, world_size * repeats)
        repeated = f" x {repeats} repeats" if repeats > 1 else ""
        raise RecipeError(
            f"optimisation.global_batch {global_batch} cannot be divided evenly over {world_size} "
            f"ranks{repeated}; possible near by: {_either(worlds)} ranks, "
            f"or a global batch of {_either(batches)}"
        )
    share = videos // world_size
    limit = share if micro_batch_limit is None else micro_batch_limit // repeats
    if limit < 1:
        raise RecipeError(
            f"engine.micro_batch {micro_batch_limit} does not hold one clip with its {repeats} repeats; "
            f"allowed: {repeats} or more"
        )
    micro = max(size for size in range(1, min(limit, share) + 1) if share % size == 0)
    return micro * repeats, share // micro


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
