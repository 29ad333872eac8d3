"""Which changes of a recipe make a training fit into the memory, by the estimate."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from trainer.config.schema import Recipe
from trainer.engine.memory_estimate import AvailableMemory, MemoryEstimate, MemoryModel
from trainer.system.formatting import format_bytes


@dataclass(frozen=True)
class Choices:
    """Batch plans to choose from: all combinations of these values, each ascending."""

    recipe: Recipe
    memory: MemoryModel
    available: AvailableMemory
    stages: Sequence[int]
    """ZeRO stages."""
    sizes: Sequence[int]
    """Micro-batches."""
    blocks: Sequence[int]
    """Numbers of recomputed blocks."""

    def estimate(self, stage: int, size: int, blocks: int) -> MemoryEstimate:
        return self.memory.estimate(zero_stage=stage, micro_batch=size, recomputed_blocks=blocks)

    def fits(self, stage: int, size: int, blocks: int) -> bool:
        return self.estimate(stage, size, blocks).total <= self.available.bytes

    def least(self, size: int) -> MemoryEstimate:
        """Of the plan that needs least memory for this micro-batch."""
        # More recomputed blocks never need more.
        estimates = [self.estimate(stage, size, self.blocks[-1]) for stage in self.stages]
        return min(estimates, key=lambda estimate: estimate.total)

    def with_evaluation_batch(self, batch: int) -> "Choices":
        evaluation = self.recipe.evaluation
        return replace(self, memory=replace(self.memory, views=batch * evaluation.clips * evaluation.crops))


def advice(possible: Choices, stage: int, size: int, recomputed: int) -> tuple[str, ...]:
    """Changes of the recipe, each enough to make a plan fit, with the memory that the plan then needs.

    Where no single change is enough: what all of them together need. possible: all plans that an `engine`
    section may ask for.
    """
    single = tuple(_single_changes(possible, stage, size, recomputed))
    if single:
        return single
    memory, available, smallest = possible.memory, possible.available, possible.sizes[0]
    for batch in _halves(possible.recipe.evaluation.batch):
        least = possible.with_evaluation_batch(batch).least(smallest).total
        if least <= available.bytes:
            return (
                f"engine: auto and evaluation.batch: {batch} together ({format_bytes(least)} at least); "
                "no single change is enough",
            )
    least = possible.with_evaluation_batch(1).least(smallest).total
    others = ["fewer model.frames", "a smaller model.preset or resolution", "or more memory"]
    if memory.ranks > 1 or available.kind == "cuda":
        others.insert(0, "more ranks (ZeRO divides the states among them)")
    if memory.precision == "fp32" and available.kind == "cuda":
        others.insert(0, "engine.precision: bf16")
    return (
        f"{', '.join(others)} (engine: auto with evaluation.batch: 1 would still need {format_bytes(least)})",
    )


def _single_changes(possible: Choices, stage: int, size: int, recomputed: int) -> Iterator[str]:
    plans = {
        "micro_batch": [(stage, other, recomputed) for other in reversed(possible.sizes) if other < size],
        "recomputed_blocks": [(stage, size, other) for other in possible.blocks if other > recomputed],
        "zero_stage": [(other, size, recomputed) for other in possible.stages if other > stage],
    }
    for (name, changed), position in zip(plans.items(), (1, 2, 0), strict=True):
        plan = next((plan for plan in changed if possible.fits(*plan)), None)
        if plan is not None:
            yield f"engine.{name}: {plan[position]} ({format_bytes(possible.estimate(*plan).total)})"
    for batch in _halves(possible.recipe.evaluation.batch):
        smaller = possible.with_evaluation_batch(batch)
        if smaller.fits(stage, size, recomputed):
            need = smaller.estimate(stage, size, recomputed).total
            yield f"evaluation.batch: {batch} ({format_bytes(need)})"
            break
    if possible.memory.precision == "fp32" and possible.available.kind == "cuda":
        half, plan = (
            replace(possible, memory=replace(possible.memory, precision="bf16")),
            (max(stage, 1), size, recomputed),
        )
        if half.fits(*plan):
            yield f"engine.precision: bf16 ({format_bytes(half.estimate(*plan).total)})"
    least = possible.least(possible.sizes[0]).total
    if least <= possible.available.bytes:
        yield f"engine: auto, which chooses all three ({format_bytes(least)} at the least)"


def _halves(batch: int) -> Iterator[int]:
    """Half of a batch, a quarter, ... down to 1."""
    while batch := batch // 2:
        yield batch
