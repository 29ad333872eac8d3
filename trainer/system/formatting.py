"""Numbers with their units as text, for messages and tables."""

from collections.abc import Sequence
from datetime import timedelta
from itertools import groupby

_GIB = 2**30


def format_ranks(ranks: Sequence[int]) -> str:
    """Ascending ranks: `rank 3`, `ranks 0-2, 4-7`."""
    return f"rank{'s' if len(ranks) > 1 else ''} {format_ranges(ranks)}"


def format_ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers: `0-3, 7`."""
    runs = [list(run) for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    return ", ".join(str(run[0][1]) if len(run) == 1 else f"{run[0][1]}-{run[-1][1]}" for run in runs)


def format_bytes(amount: int, decimals: int = 1) -> str:
    """`14.5 GiB`, `64 MiB`, `100 KiB`; nothing is `0 MiB`."""
    if 0 < amount < 2**20 - 2**9:  # from 1,023.5 KiB on, 1 MiB is nearer
        return f"{max(1, round(amount / 2**10))} KiB"
    return f"{amount / _GIB:,.{decimals}f} GiB" if amount >= _GIB // 10 else f"{amount / 2**20:.0f} MiB"


def format_percent(share: float, decimals: int = 2) -> str:
    """A share of 0..1: `12.34 %`."""
    return f"{100 * share:.{decimals}f} %"


def format_gmacs(amount: float) -> str:
    """Multiply-accumulates in units of 10^9: `1,234.5 GMACs`, `0.0123 GMACs`."""
    return f"{amount:,.1f} GMACs" if amount >= 1 else f"{amount:.3g} GMACs"


def format_duration(seconds: float) -> str:
    """`1:02:03`, `2 days, 1:02:03`."""
    return str(timedelta(seconds=round(seconds)))


def format_age(seconds: float) -> str:
    """`45s`, `12m`, `3h04m`, `2d03h`."""
    whole = max(0, int(seconds))
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days}d{hours % 24:02d}h"
    if hours:
        return f"{hours}h{minutes % 60:02d}m"
    return f"{minutes}m" if minutes else f"{whole}s"


def format_video_time(seconds: float) -> str:
    """`1:02:03.4`."""
    tenths = round(10 * seconds)
    minutes, tenths = divmod(tenths, 600)
    return f"{minutes // 60}:{minutes % 60:02d}:{tenths // 10:02d}.{tenths % 10}"
