"""State shards: all of the state once, under the model's names; a write changes the state in use."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch
import torch.distributed as dist

from tests.trainer.checkpoint.training import FROZEN, make_engine, make_model, model_weights, same, train
from tests.trainer.ranks import Ranks
from trainer.engine.state_shards import MOMENTS, StateShard, owned_shards


@pytest.fixture(scope="module")
def ranks() -> Iterator[dict[int, Ranks]]:
    with ExitStack() as stack:
        yield {world_size: stack.enter_context(Ranks(world_size)) for world_size in (1, 2)}


def held(key: str, values: torch.Tensor, *, replicated: bool) -> StateShard:
    return StateShard(key, 0, values, tuple(values.shape), replicated)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 100])
def test_replicated_shards_are_divided_evenly_and_once(world_size: int) -> None:
    sizes = {"weight/a": 10, "weight/b": 1, "weight/c": 23}
    own = held("weight/own", torch.zeros(4), replicated=False)
    shards = [own, *(held(key, torch.arange(float(n)), replicated=True) for key, n in sizes.items())]
    seen: Counter[tuple[str, int]] = Counter()
    for rank in range(world_size):
        mine = owned_shards(shards, rank, world_size)
        assert mine[0] is own
        shared = mine[1:]
        assert sum(shard.count for shard in shared) in (34 // world_size, -(-34 // world_size))
        for shard in shared:
            assert shard.count > 0
            assert shard.values.tolist() == list(range(shard.start, shard.start + shard.count))
            seen.update((shard.key, element) for element in range(shard.start, shard.start + shard.count))
    assert seen == Counter({(key, element): 1 for key, n in sizes.items() for element in range(n)})


def cover(stage: int, trained: bool) -> list[tuple[str, int, int, tuple[int, ...]]]:
    """The shards that this rank saves."""
    engine = make_engine(stage)
    if trained:
        train(engine, 0, 1)
    own = owned_shards(engine.state_shards(), dist.get_rank(), dist.get_world_size())
    return [(shard.key, shard.start, shard.count, shard.shape) for shard in own]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_ranks_together_save_everything_once(ranks: dict[int, Ranks], stage: int) -> None:
    """Before the first step too, when AdamW has no moments yet."""
    model = make_model()
    expected = {}
    for name, parameter in model.named_parameters():
        kinds = ("weight",) if name == FROZEN else ("weight", *MOMENTS)
        expected |= {f"{kind}/{name}": tuple(parameter.shape) for kind in kinds}
        expected[f"average/weight/{name}"] = tuple(parameter.shape)
    for name, buffer in model.named_buffers():
        expected[f"buffer/{name}"] = tuple(buffer.shape)
        if buffer.is_floating_point():
            expected[f"average/buffer/{name}"] = tuple(buffer.shape)
    for world_size, trained in ((1, True), (2, False), (2, True)):
        saved = ranks[world_size].run(cover, stage, trained)
        seen: Counter[tuple[str, int]] = Counter()
        for rank in saved:
            for key, start, count, shape in rank:
                assert shape == expected[key]
                seen.update((key, element) for element in range(start, start + count))
        assert set(seen.values()) == {1}
        numbers = Counter(key for key, _ in seen)
        assert numbers == {key: torch.Size(shape).numel() for key, shape in expected.items()}
        sizes = [sum(count for _, _, count, _ in rank) for rank in saved]
        assert max(sizes) < 1.25 * min(sizes), "each rank writes about as much"


def write_and_resume(stage: int) -> None:
    """Known numbers written into each element of the shards."""
    engine = make_engine(stage)
    train(engine, 0, 1)
    expected = {}
    for number, (name, parameter) in enumerate(make_model().named_parameters()):
        elements = torch.arange(parameter.numel(), dtype=torch.float32)
        expected[name] = (number + elements / parameter.numel()).view(parameter.shape)
    for shard in engine.state_shards():
        kind, _, name = shard.key.partition("/")
        if kind == "weight":
            shard.values.copy_(expected[name].view(-1)[shard.start : shard.start + shard.count])
    engine.resume(17)
    assert engine.updates == 17
    for name, weight in model_weights(engine).items():
        assert same(weight, expected[name]), name
    if dist.get_rank() == 0:
        assert all(
            same(weight, expected[name])
            for name, weight in engine.gather_weights().items()
            if name in expected
        )
    else:
        engine.gather_weights()
    train(engine, 1, 1)
    assert engine.updates == 18
    after = model_weights(engine)
    assert same(after[FROZEN], expected[FROZEN])
    assert not same(after["head.weight"], expected["head.weight"])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_model_computes_with_weights_written_into_shards(ranks: dict[int, Ranks], stage: int) -> None:
    ranks[2].run(write_and_resume, stage)
