"""Numbers with their units."""

import pytest

from trainer.system.formatting import format_bytes


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "0 MiB"),
        (1, "1 KiB"),
        (1535, "1 KiB"),
        (1537, "2 KiB"),
        (300_000, "293 KiB"),
        (2**20 - 2**9 - 1, "1023 KiB"),
        (2**20 - 2**9, "1 MiB"),
        (2**20, "1 MiB"),
        (2**26, "64 MiB"),
        (29 * 2**29, "14.5 GiB"),
    ],
)
def test_an_amount_of_memory_is_never_rounded_to_nothing(amount: int, text: str) -> None:
    assert format_bytes(amount) == text
