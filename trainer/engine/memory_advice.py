"""Which changes of a recipe make a training fit into the memory, by the estimate."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from trainer.config.schema import Recipe
from trainer.engine.memory_estimate import GIB, AvailableMemory, MemoryModel


@dataclass(frozen=True)
class Alternatives:
    """The values that are possible, each ascending."""

    recipe: Recipe
    memory: MemoryModel
    available: AvailableMemory
    stages: Sequence[int]
    """ZeRO stages."""
    sizes: Sequence[int]
    """Micro-batches."""
    blocks: Sequence[int]
    """Numbers of recomputed blocks."""


def advice(options: Alternatives, stage: int, size: int, recomputed: int) -> tuple[str, ...]:
    """Changes of the recipe, each enough to make a plan fit, with the memory that the plan then needs.

    Where no single change is enough: what all of them together need.
    """
    single = tuple(_single(options, stage, size, recomputed))
    if single:
        return single
    batch = options.recipe.evaluation.batch // 2
    while batch > 1 and _least(options, _with_batch(options, batch)) > options.available.bytes:
        batch //= 2
    least = _least(options, _with_batch(options, max(batch, 1)))
    if least <= options.available.bytes:
        return (
            f"engine: auto and evaluation.batch: {max(batch, 1)} together ({_gib(least)} at the least); no "
            "single change is enough",
        )
    others = ["fewer model.frames", "a smaller model.preset or resolution", "more memory"]
    if options.memory.ranks > 1 or options.available.kind == "cuda":
        others.insert(0, "more ranks, over which ZeRO partitions")
    if options.memory.precision == "fp32" and options.available.kind == "cuda":
        others.insert(0, "engine.precision: bf16")
    return (
        f"nothing in engine and evaluation is enough: engine: auto with evaluation.batch: 1 would still need "
        f"{_gib(least)}. What is left: {', '.join(others)}",
    )


def _single(options: Alternatives, stage: int, size: int, recomputed: int) -> Iterator[str]:
    memory, available = options.memory, options.available.bytes
    plan = {"zero_stage": stage, "micro_batch": size, "recomputed_blocks": recomputed}

    def estimate(name: str, value: int, of: MemoryModel = memory) -> int:
        return of.estimate(**{**plan, name: value}).total

    choices = {
        "micro_batch": [other for other in reversed(options.sizes) if other < size],
        "recomputed_blocks": [other for other in options.blocks if other > recomputed],
        "zero_stage": [other for other in options.stages if other > stage],
    }
    for name, values in choices.items():
        found = next((value for value in values if estimate(name, value) <= available), None)
        if found is not None:
            yield f"engine.{name}: {found} ({_gib(estimate(name, found))})"
    batch = options.recipe.evaluation.batch // 2
    while batch and estimate("zero_stage", stage, _with_batch(options, batch)) > available:
        batch //= 2
    if batch:
        fewer = estimate("zero_stage", stage, _with_batch(options, batch))
        yield f"evaluation.batch: {batch} ({_gib(fewer)})"
    if memory.precision == "fp32" and options.available.kind == "cuda":
        half = estimate("zero_stage", max(stage, 1), replace(memory, precision="bf16"))
        if half <= available:
            yield f"engine.precision: bf16 ({_gib(half)})"
    least = _least(options, memory)
    if least <= available:
        yield f"engine: auto, which chooses all three ({_gib(least)} at the least)"


def _with_batch(options: Alternatives, batch: int) -> MemoryModel:
    evaluation = options.recipe.evaluation
    return replace(options.memory, views=batch * evaluation.clips * evaluation.crops)


def _least(options: Alternatives, memory: MemoryModel) -> int:
    """Bytes of the plan that needs least: more recomputed blocks never need more, nor do fewer clips."""
    plans = product(options.stages, options.sizes[:1], options.blocks[-1:])
    return min(
        memory.estimate(zero_stage=stage, micro_batch=size, recomputed_blocks=blocks).total
        for stage, size, blocks in plans
    )


def _gib(amount: int) -> str:
    return f"{amount / GIB:,.1f} GiB"
