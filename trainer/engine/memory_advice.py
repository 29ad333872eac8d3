"""What makes a training fit that does not: which single change is enough, by the estimate of memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from trainer.config.schema import Recipe
from trainer.engine.memory_estimate import GIB, AvailableMemory, MemoryModel


@dataclass(frozen=True)
class Alternatives:
    """What may be changed. stages, sizes, blocks: all ZeRO stages, micro-batches and numbers of recomputed
    blocks that are possible, ascending.
    """

    recipe: Recipe
    needs: MemoryModel
    room: AvailableMemory
    stages: Sequence[int]
    sizes: Sequence[int]
    blocks: Sequence[int]


def advice(means: Alternatives, stage: int, size: int, recomputed: int) -> tuple[str, ...]:
    """Changes of the recipe, each of which alone makes a layout fit, with what it then needs; where none
    does, what all of them together come to.
    """
    single = tuple(_single(means, stage, size, recomputed))
    if single:
        return single
    batch = means.recipe.evaluation.batch // 2
    while batch > 1 and _least(means, _with_batch(means, batch)) > means.room.bytes:
        batch //= 2
    least = _least(means, _with_batch(means, max(batch, 1)))
    if least <= means.room.bytes:
        return (
            f"engine: auto and evaluation.batch: {max(batch, 1)} together ({_gib(least)} at the least); no "
            "single change is enough",
        )
    others = ["fewer model.frames", "a smaller model.preset or resolution", "more memory"]
    if means.needs.ranks > 1 or means.room.kind == "cuda":
        others.insert(0, "more ranks, over which ZeRO partitions")
    if means.needs.precision == "fp32" and means.room.kind == "cuda":
        others.insert(0, "engine.precision: bf16")
    return (
        f"nothing in engine and evaluation is enough: engine: auto with evaluation.batch: 1 would still need "
        f"{_gib(least)}. What is left: {', '.join(others)}",
    )


def _single(means: Alternatives, stage: int, size: int, recomputed: int) -> Iterator[str]:
    needs, room = means.needs, means.room.bytes

    layout = {"zero_stage": stage, "micro_batch": size, "recomputed_blocks": recomputed}

    def estimate(name: str, value: int, of: MemoryModel = needs) -> int:
        return of.estimate(**{**layout, name: value}).total

    choices = {
        "micro_batch": [other for other in reversed(means.sizes) if other < size],
        "recomputed_blocks": [other for other in means.blocks if other > recomputed],
        "zero_stage": [other for other in means.stages if other > stage],
    }
    for name, values in choices.items():
        found = next((value for value in values if estimate(name, value) <= room), None)
        if found is not None:
            yield f"engine.{name}: {found} ({_gib(estimate(name, found))})"
    batch = means.recipe.evaluation.batch // 2
    while batch and estimate("zero_stage", stage, _with_batch(means, batch)) > room:
        batch //= 2
    if batch:
        fewer = estimate("zero_stage", stage, _with_batch(means, batch))
        yield f"evaluation.batch: {batch} ({_gib(fewer)})"
    if needs.precision == "fp32" and means.room.kind == "cuda":
        half = estimate("zero_stage", max(stage, 1), replace(needs, precision="bf16"))
        if half <= room:
            yield f"engine.precision: bf16 ({_gib(half)})"
    least = _least(means, needs)
    if least <= room:
        yield f"engine: auto, which chooses all three ({_gib(least)} at the least)"


def _with_batch(means: Alternatives, batch: int) -> MemoryModel:
    evaluation = means.recipe.evaluation
    return replace(means.needs, views=batch * evaluation.clips * evaluation.crops)


def _least(means: Alternatives, needs: MemoryModel) -> int:
    """Bytes of the layout that needs least; more blocks never need more, nor do fewer clips."""
    layouts = product(means.stages, means.sizes[:1], means.blocks[-1:])
    return min(
        needs.estimate(zero_stage=stage, micro_batch=size, recomputed_blocks=blocks).total
        for stage, size, blocks in layouts
    )


def _gib(amount: int) -> str:
    return f"{amount / GIB:,.1f} GiB"
