"""Numbers in words, for messages."""

from collections.abc import Sequence
from itertools import groupby


def format_ranks(ranks: Sequence[int]) -> str:
    """Ascending ranks in short: `rank 3`, `ranks 0-2, 4-7`."""
    return f"rank{'s' if len(ranks) > 1 else ''} {format_ranges(ranks)}"


def format_ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in short: `0-3, 7`."""
    runs = [list(run) for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0][1]) if len(run) == 1 else f"{run[0][1]}-{run[-1][1]}" for run in runs)


def format_duration(seconds: float) -> str:
    """`45s`, `12m`, `3h04m`, `2d03h`."""
    whole = max(0, int(seconds))
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days}d{hours % 24:02d}h"
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{minutes}m" if minutes else f"{whole}s"
