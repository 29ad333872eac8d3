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


def work_on(errors: list[Exception | None]) -> str:
    """What a rank gets that fails with its error of the list, or returns its number."""
    import torch.distributed as dist

    from trainer.distributed.collectives import run_on_all_ranks
    from trainer.errors import AgreedError

    def work() -> int:
        error = errors[dist.get_rank()]
        if error is not None:
            raise error
        return dist.get_rank()

    try:
        return str(run_on_all_ranks(work))
    except AgreedError as error:
        return f"agreed: {error}"


def test_an_error_of_one_rank_is_raised_on_all() -> None:
    from pipelines.errors import DataError
    from trainer.errors import RunError

    with Ranks(2) as two:
        assert two.run(work_on, [None, None]) == ["0", "1"]
        assert two.run(work_on, [None, RunError("no space")]) == ["agreed: no space"] * 2
        assert two.run(work_on, [RunError("no space"), RunError("no space")]) == ["agreed: no space"] * 2
        first, second = two.run(work_on, [RunError("no space"), DataError("no manifest")])
    assert first == second == "agreed: rank 0: no space\nrank 1: no manifest"
