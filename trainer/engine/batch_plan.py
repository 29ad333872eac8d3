"""The batch plan: ZeRO stage, micro-batch, accumulation, recomputed blocks; `auto` fits the memory."""

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
"""Tokens in a forward pass. Blocks are recomputed to reach this many, but not to exceed it.

A matrix product of so many by 1,024 x 1,024 takes a current GPU some 30 µs, and PyTorch some 10 µs to launch.
With far fewer, the GPU waits for launches; more do not make up for computing blocks twice. Calculated, not
measured.
"""


@dataclass(frozen=True)
class BatchPlan:
    """The recipe's `engine` section, resolved for a number of ranks."""

    zero_stage: int
    """What is partitioned over the ranks."""
    micro_batch: int
    """Clips per rank and forward pass."""
    accumulation: int
    """Micro-batches per optimiser step."""
    recomputed_blocks: int
    """Backbone blocks whose activations are recomputed."""
    why: tuple[str, ...] = ()
    """One line for each choice that the recipe leaves to `auto`, or that differs from the recipe."""
    advice: tuple[str, ...] = ()
    """Where the recipe's numbers do not fit by the estimate: what would make them fit."""


def choose_batch_plan(
    recipe: Recipe,
    config: UniFormerV2Config,
    world_size: int,
    *,
    precision: Precision,
    available: AvailableMemory,
) -> BatchPlan:
    """The plan that the recipe asks for, with its `auto` fields fitted to the memory.

    The first choice is the least recomputation, then the lowest stage, then the largest micro-batch; but
    blocks are recomputed where a forward pass would otherwise have fewer than ENOUGH_TOKENS. Numbers of the
    recipe are kept, with advice where they do not fit by the estimate.

    Args:
        config: of the model; its recomputed blocks are ignored.
        precision: `engine.precision`, resolved.
        available: of the rank that has least; all ranks must pass the same value, to choose the same plan.

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
    memory = MemoryModel.of(recipe, config, ranks=world_size, precision=precision, kind=available.kind)
    alternatives = Alternatives(
        recipe, memory, available, _possible_stages(recipe, world_size, precision), every_size,
        range(config.depth + 1),
    )  # fmt: skip
    choice = _Candidates(memory, available, stages, sizes, blocks, alternatives)
    if "auto" not in (engine.zero_stage, engine.micro_batch, engine.recomputed_blocks):
        plan = BatchPlan(stages[0], given, share // given, blocks[0], tuple(notes))
        return replace(plan, advice=choice.advice(stages[0], given, blocks[0]))
    stage, size, recomputed = choice.best(recipe)
    if engine.micro_batch == "auto":
        notes.append(choice.why_micro_batch(stage, size, recomputed))
        if config.local_mhra:
            notes.append(
                f"batch norms average over {size * world_size} clips, engine.micro_batch x {world_size}, and "
                f"results depend on that: set engine.micro_batch to {size} for the same with other memory"
            )
    if engine.recomputed_blocks == "auto":
        notes.append(choice.why_recomputed(stage, size, recomputed))
    if engine.zero_stage == "auto":
        notes.append(choice.why_stage(stage, size, recomputed))
    return BatchPlan(stage, size, share // size, recomputed, tuple(notes))


def _stages(recipe: Recipe, world_size: int, precision: Precision) -> tuple[Sequence[int], list[str]]:
    """The stages to choose from, lowest first, and a note where they differ from the recipe's."""
    possible = _possible_stages(recipe, world_size, precision)
    lowest, wanted = possible[0], recipe.engine.zero_stage
    if wanted == "auto":
        return possible, []
    if wanted < lowest:
        return [lowest], [
            f"ZeRO stage {lowest}, although engine.zero_stage is {wanted}: in bf16, gradients are "
            f"accumulated in fp32 from stage {lowest} on only. Set it to {lowest}"
        ]
    return [wanted], []


def _possible_stages(recipe: Recipe, world_size: int, precision: Precision) -> Sequence[int]:
    """The stages that `auto` chooses from, lowest first.

    In bf16 the lowest is 1: at stage 0, DeepSpeed would accumulate gradients in bf16 and lose most of each.
    """
    lowest = 1 if precision == "bf16" else 0
    highest = 2 if recipe.engine.compile else 3  # `EngineSection` refuses 3
    return range(lowest, highest + 1) if world_size > 1 else [lowest]


@dataclass(frozen=True)
class _Candidates:
    """The values to choose from, each ascending."""

    memory: MemoryModel
    available: AvailableMemory
    stages: Sequence[int]
    sizes: Sequence[int]
    """Micro-batches."""
    blocks: Sequence[int]
    """Numbers of recomputed blocks."""
    alternatives: Alternatives
    """All values that are possible, those included that the recipe rules out by its numbers."""

    def best(self, recipe: Recipe) -> tuple[int, int, int]:
        """Stage, micro-batch, recomputed blocks. Raises RunError where nothing fits."""
        config = self.memory.config
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
        """Why the micro-batch is not larger."""
        need = self._out_of(self._estimate(stage, size, recomputed))
        text = f"engine.micro_batch auto: {_clips(size)}, {need}"
        if size == self.sizes[-1]:
            return f"{text}; that is a rank's whole share of the global batch"
        larger = self.sizes[self.sizes.index(size) + 1]
        least = self._least(larger)
        if least.total > self.available.bytes:
            return f"{text}; {larger} would need {_gib(least.total)}{self._even_with()}"
        same = self._estimate(stage, larger, recomputed)
        return f"{text}; {larger} would need {_gib(same.total)}, or more recomputed or partitioned"

    def why_recomputed(self, stage: int, size: int, recomputed: int) -> str:
        """Why not fewer blocks are recomputed."""
        text = f"engine.recomputed_blocks auto: {recomputed} of {self.memory.config.depth}"
        if recomputed == 0:
            return f"{text}, {_clips(size)} fit without"
        fewer = self._estimate(stage, size, recomputed - 1)
        return f"{text}; with {recomputed - 1}, {_clips(size)} would need {self._out_of(fewer)}"

    def why_stage(self, stage: int, size: int, recomputed: int) -> str:
        """Why the stage is not lower."""
        text = f"engine.zero_stage auto: {stage}"
        if len(self.stages) == 1:
            return f"{text}, there is one rank only"
        if stage == self.stages[0]:
            return f"{text}, nothing more needs to be partitioned"
        lower = self._estimate(stage - 1, size, recomputed)
        return f"{text}; with {stage - 1}, {_clips(size)} would need {self._out_of(lower)}"

    def advice(self, stage: int, size: int, blocks: int) -> tuple[str, ...]:
        """What would make a plan fit; nothing for one that fits."""
        return () if self._fits(stage, size, blocks) else advice(self.alternatives, stage, size, blocks)

    def _fits(self, stage: int, size: int, blocks: int) -> bool:
        return self._estimate(stage, size, blocks).total <= self.available.bytes

    def _estimate(self, stage: int, size: int, blocks: int) -> MemoryEstimate:
        return self.memory.estimate(zero_stage=stage, micro_batch=size, recomputed_blocks=blocks)

    def _least(self, size: int) -> MemoryEstimate:
        """Of the plan that needs least memory for so many clips."""
        estimates = [
            self._estimate(stage, size, blocks) for stage, blocks in product(self.stages, self.blocks)
        ]
        return min(estimates, key=lambda estimate: estimate.total)

    def _even_with(self) -> str:
        depth = self.memory.config.depth
        means = [f"all {depth} blocks recomputed"] if len(self.blocks) > 1 else []
        means += ["any ZeRO stage"] if len(self.stages) > 1 else []
        return f" even with {' and '.join(means)}" if means else ""

    def _nothing_fits(self, recipe: Recipe) -> str:
        least = self._least(self.sizes[0])
        helps = advice(self.alternatives, self.stages[-1], self.sizes[0], self.blocks[-1])
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
            f"{self._out_of(least)}{self._even_with()} ({_gib(least.states)} of weights, gradients and "
            f"optimiser, {_gib(least.working)} of activations and buffers, {_gib(least.clips)} of clips made "
            f"ahead, {_gib(least.reserve)} in reserve). What helps: {'; or '.join(helps)}"
        )

    def _out_of(self, estimate: MemoryEstimate) -> str:
        return f"{_gib(estimate.total)} of {_gib(self.available.bytes)} GiB"


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _clips(count: int) -> str:
    return f"{count} clip{'s' if count > 1 else ''}"


def _gib(amount: int) -> str:
    return f"{amount / GIB:,.1f}"
