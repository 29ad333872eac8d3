"""How the work is laid out on the devices: ZeRO stage, micro-batch, accumulation, recomputed blocks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import ceil

from models import UniFormerV2Config
from trainer.config.schema import Recipe
from trainer.engine.batch_split import split_batch
from trainer.engine.memory_advice import Alternatives, advice
from trainer.engine.memory_estimate import GIB, AvailableMemory, MemoryEstimate, MemoryModel
from trainer.errors import RunError
from trainer.system.device import Precision

ENOUGH_TOKENS = 8192
"""Tokens in a forward pass for whose sake blocks are recomputed, but for no more.

A matrix product of so many by 1,024 x 1,024 takes a current GPU some 30 µs, and PyTorch some 10 µs to launch.
With much less the GPU waits for its orders; with more, nothing is won that makes up for computing blocks
twice. Calculated, not measured.
"""


@dataclass(frozen=True)
class BatchPlan:
    """What the recipe's `engine` section comes to for so many ranks.

    zero_stage: what is partitioned over the ranks. micro_batch: clips per rank and forward pass.
    accumulation: micro-batches per optimiser step. recomputed_blocks: of the backbone. why: a line for each
    choice that was left to `auto`, or is not what the recipe says. advice: what would make it fit, where the
    recipe's numbers do not by the estimate; nothing where they do.
    """

    zero_stage: int
    micro_batch: int
    accumulation: int
    recomputed_blocks: int
    why: tuple[str, ...] = ()
    advice: tuple[str, ...] = ()


def choose_batch_plan(
    recipe: Recipe, config: UniFormerV2Config, world_size: int, *, precision: Precision, room: AvailableMemory
) -> BatchPlan:
    """The layout that the recipe asks for, with what it leaves to `auto` fitted to the memory.

    Preferred is the least recomputation, with that the lowest stage, with that the largest micro-batch; but
    blocks are recomputed rather than have less than ENOUGH_TOKENS in a forward pass. What the recipe gives in
    numbers is taken as it is, with advice where it does not fit by the estimate.

    Args:
        config: of the model; its recomputed blocks are not looked at.
        precision: what `engine.precision` comes to.
        room: what every rank has at least; all ranks must be given the same, to choose the same.

    Raises:
        RecipeError: the global batch cannot be divided so.
        RunError: something is left to `auto`, and nothing fits.
    """
    engine, batch, repeats = recipe.engine, recipe.optimisation.global_batch, recipe.sampling.repeats
    stages, notes = _stages(recipe, world_size, precision)
    blocks = range(config.depth + 1) if engine.recomputed_blocks == "auto" else [engine.recomputed_blocks]
    limit = None if engine.micro_batch == "auto" else engine.micro_batch
    given, _ = split_batch(batch, world_size, limit, repeats)
    share = batch // world_size
    every_size = [size * repeats for size in _divisors(share // repeats)]
    sizes = every_size if engine.micro_batch == "auto" else [given]
    needs = MemoryModel.of(recipe, config, ranks=world_size, precision=precision, kind=room.kind)
    means = Alternatives(
        recipe, needs, room, _possible_stages(recipe, world_size, precision), every_size,
        range(config.depth + 1),
    )  # fmt: skip
    choice = _Choice(needs, room, stages, sizes, blocks, means)
    if "auto" not in (engine.zero_stage, engine.micro_batch, engine.recomputed_blocks):
        layout = BatchPlan(stages[0], given, share // given, blocks[0], tuple(notes))
        return replace(layout, advice=choice.advice(stages[0], given, blocks[0]))
    stage, size, recomputed = choice.best(recipe)
    if engine.micro_batch == "auto":
        notes.append(choice.why_micro_batch(stage, size, recomputed))
        if config.local_mhra:
            notes.append(
                f"batch norms see {size * world_size} clips at a time, engine.micro_batch x {world_size}, "
                f"and results depend on that: set engine.micro_batch to {size} for the same with other memory"
            )
    if engine.recomputed_blocks == "auto":
        notes.append(choice.why_recomputed(stage, size, recomputed))
    if engine.zero_stage == "auto":
        notes.append(choice.why_stage(stage, size, recomputed))
    return BatchPlan(stage, size, share // size, recomputed, tuple(notes))


def _stages(recipe: Recipe, world_size: int, precision: Precision) -> tuple[Sequence[int], list[str]]:
    """The stages to choose from, lowest first, and a note where that is not what the recipe says."""
    possible = _possible_stages(recipe, world_size, precision)
    lowest, wanted = possible[0], recipe.engine.zero_stage
    if wanted == "auto":
        return possible, []
    if wanted < lowest:
        return [lowest], [
            f"ZeRO stage {lowest}, although engine.zero_stage is {wanted}: in bf16, gradients are added up "
            f"in fp32 from stage {lowest} on only. Set it to {lowest} to agree"
        ]
    return [wanted], []


def _possible_stages(recipe: Recipe, world_size: int, precision: Precision) -> Sequence[int]:
    """All that `auto` chooses from, lowest first.

    In bf16 the lowest is 1: without a stage, DeepSpeed would add up gradients in bf16 and lose most of each.
    """
    lowest = 1 if precision == "bf16" else 0
    highest = 2 if recipe.engine.compile else 3  # as the recipe's check has it
    return range(lowest, highest + 1) if world_size > 1 else [lowest]  # one rank has nobody to share with


@dataclass(frozen=True)
class _Choice:
    """What there is to choose from: stages, sizes of micro-batches, recomputed blocks; ascending.

    means: what there would be without the recipe's own numbers.
    """

    needs: MemoryModel
    room: AvailableMemory
    stages: Sequence[int]
    sizes: Sequence[int]
    blocks: Sequence[int]
    means: Alternatives

    def best(self, recipe: Recipe) -> tuple[int, int, int]:
        """Stage, micro-batch, recomputed blocks. Raises RunError where nothing fits."""
        config = self.needs.config
        enough = ceil(ENOUGH_TOKENS / (config.inner_frames * (1 + config.grid**2)))
        large = [size for size in self.sizes if size >= enough] or self.sizes[-1:]
        for blocks, stage in product(self.blocks, self.stages):
            for size in reversed(large):
                if self._fits(stage, size, blocks):
                    return stage, size, blocks
        small = [size for size in self.sizes if size not in large]
        for size in reversed(small):
            for blocks, stage in product(self.blocks, self.stages):
                if self._fits(stage, size, blocks):
                    return stage, size, blocks
        raise RunError(self._nothing_fits(recipe))

    def why_micro_batch(self, stage: int, size: int, recomputed: int) -> str:
        """Why not more clips."""
        text = (
            f"engine.micro_batch auto: {_clips(size)}, {self._of_room(self._demand(stage, size, recomputed))}"
        )
        if size == self.sizes[-1]:
            return f"{text}; that is a rank's whole share of the global batch"
        larger = self.sizes[self.sizes.index(size) + 1]
        least = self._least(larger)
        if least.total > self.room.bytes:
            return f"{text}; {larger} would need {_gib(least.total)}{self._with_all_means()}"
        same = self._demand(stage, larger, recomputed)
        return f"{text}; {larger} would need {_gib(same.total)}, or more recomputed or partitioned"

    def why_recomputed(self, stage: int, size: int, recomputed: int) -> str:
        """Why not fewer blocks."""
        text = f"engine.recomputed_blocks auto: {recomputed} of {self.needs.config.depth}"
        if recomputed == 0:
            return f"{text}, {_clips(size)} fit without"
        fewer = self._demand(stage, size, recomputed - 1)
        return f"{text}; with {recomputed - 1}, {_clips(size)} would need {self._of_room(fewer)}"

    def why_stage(self, stage: int, size: int, recomputed: int) -> str:
        """Why not a lower stage."""
        text = f"engine.zero_stage auto: {stage}"
        if len(self.stages) == 1:
            return f"{text}, one rank has nobody to share with"
        if stage == self.stages[0]:
            return f"{text}, nothing more needs to be partitioned"
        lower = self._demand(stage - 1, size, recomputed)
        return f"{text}; with {stage - 1}, {_clips(size)} would need {self._of_room(lower)}"

    def advice(self, stage: int, size: int, blocks: int) -> tuple[str, ...]:
        """What makes a layout fit that does not."""
        return () if self._fits(stage, size, blocks) else advice(self.means, stage, size, blocks)

    def _fits(self, stage: int, size: int, blocks: int) -> bool:
        return self._demand(stage, size, blocks).total <= self.room.bytes

    def _demand(self, stage: int, size: int, blocks: int) -> MemoryEstimate:
        return self.needs.estimate(zero_stage=stage, micro_batch=size, recomputed_blocks=blocks)

    def _least(self, size: int) -> MemoryEstimate:
        """The least that so many clips can be had with."""
        demands = [self._demand(stage, size, blocks) for stage, blocks in product(self.stages, self.blocks)]
        return min(demands, key=lambda estimate: estimate.total)

    def _with_all_means(self) -> str:
        depth = self.needs.config.depth
        means = [f"all {depth} blocks recomputed"] if len(self.blocks) > 1 else []
        means += ["any ZeRO stage"] if len(self.stages) > 1 else []
        return f" even with {' and '.join(means)}" if means else ""

    def _nothing_fits(self, recipe: Recipe) -> str:
        least = self._least(self.sizes[0])
        helps = advice(self.means, self.stages[-1], self.sizes[0], self.blocks[-1])
        engine = recipe.engine
        given = [
            f"engine.{name} {value}"
            for name, value in (
                ("zero_stage", engine.zero_stage),
                ("micro_batch", engine.micro_batch),
                ("recomputed_blocks", engine.recomputed_blocks),
            )
            if value != "auto"
        ]
        asked = f" with {' and '.join(given)}" if given else ""
        return (
            f"the training does not fit{asked}: {_clips(self.sizes[0])} a rank and forward pass would need "
            f"{self._of_room(least)}{self._with_all_means()} ({_gib(least.states)} of weights, gradients and "
            f"optimiser, {_gib(least.working)} of activations and buffers, {_gib(least.clips)} of clips made "
            f"ahead, {_gib(least.reserve)} in reserve). What helps: {'; or '.join(helps)}"
        )

    def _of_room(self, estimate: MemoryEstimate) -> str:
        return f"{_gib(estimate.total)} of {_gib(self.room.bytes)} GiB"


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _clips(count: int) -> str:
    return f"{count} clip{'s' if count > 1 else ''}"


def _gib(amount: int) -> str:
    return f"{amount / GIB:,.1f}"
