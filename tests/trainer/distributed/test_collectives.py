"""What each rank reads for itself has to be the same on all."""

from tests.trainer.ranks import Ranks


def compare(texts: list[str]) -> str:
    import torch.distributed as dist

    from trainer.distributed.collectives import check_same_on_all_ranks
    from trainer.errors import AgreedError

    try:
        check_same_on_all_ranks("the recipe", texts[dist.get_rank()])
    except AgreedError as error:
        return str(error)
    return "the same"


def test_recipes_that_differ_between_ranks_are_refused_on_all() -> None:
    with Ranks(2) as two:
        assert two.run(compare, ["a: 1\nb: 2\n"] * 2) == ["the same"] * 2
        first, second = two.run(compare, ["a: 1\nb: 2\n", "a: 1\nb: 3\n"])
    assert first == second
    assert "the recipe" in first and "rank 1" in first and "`b: 3` and not `b: 2`" in first
