"""The division of the global batch."""

import pytest

from trainer.engine.batch_split import split_batch
from trainer.errors import RecipeError


@pytest.mark.parametrize(
    ("global_batch", "world_size", "limit", "repeats", "expected"),
    [
        (32, 1, None, 1, (32, 1)),
        (32, 2, None, 1, (16, 1)),
        (32, 2, 8, 1, (8, 2)),
        (32, 2, 7, 1, (4, 4)),
        (32, 2, 100, 1, (16, 1)),
        (30, 2, 7, 1, (5, 3)),
        (64, 2, 12, 2, (8, 4)),
        (64, 2, 13, 2, (8, 4)),
        (12, 2, 4, 3, (3, 2)),
    ],
)
def test_the_largest_micro_batch_within_the_limit(
    global_batch: int, world_size: int, limit: int | None, repeats: int, expected: tuple[int, int]
) -> None:
    assert split_batch(global_batch, world_size, limit, repeats) == expected


def test_the_parts_make_up_the_batch_and_keep_the_limit() -> None:
    for global_batch in range(1, 61):
        for world_size in range(1, 7):
            for limit in (1, 2, 5, 9, None):
                if global_batch % world_size:
                    continue
                micro, accumulation = split_batch(global_batch, world_size, limit)
                assert micro * accumulation * world_size == global_batch
                assert limit is None or micro <= limit
                share = global_batch // world_size
                assert not any(share % size == 0 for size in range(micro + 1, min(limit or share, share) + 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((64, 3, None, 1), "over 3 ranks; possible near by: 2 or 4 ranks, or a global batch of 63 or 66"),
        ((2, 4, None, 1), "over 4 ranks; possible near by: 2 ranks, or a global batch of 4"),
        (
            (64, 3, None, 2),
            "possible near by: 2 or 4 ranks, or a global batch of 60",
        ),
        ((63, 3, None, 2), "global_batch 63 is no multiple of 2 clips that stay together (sampling.repeats"),
        ((64, 2, 1, 2), "engine.micro_batch 1 does not hold 2 clips"),
    ],
)
def test_an_impossible_division_names_the_possible_ones(
    arguments: tuple[int, int, int | None, int], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        split_batch(*arguments)
    assert message in str(caught.value)
