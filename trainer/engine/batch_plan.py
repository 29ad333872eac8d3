"""The batch plan: ZeRO stage, micro-batch, accumulation, recomputed blocks; `auto` fits the memory."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace

from models import UniFormerV2Config
from trainer.config.schema import Recipe
from trainer.engine.batch_split import split_batch
from trainer.engine.memory_advice import Choices, advice
from trainer.engine.memory_estimate import AvailableMemory, MemoryEstimate, MemoryModel
from trainer.engine.step_cost import StepCost, describe_device
from trainer.errors import RunError
from trainer.system.device import Precision
from trainer.system.formatting import format_bytes

Plan = tuple[int, int, int]
"""ZeRO stage, micro-batch, recomputed blocks."""


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


@dataclass(frozen=True)
class EarlierPlan:
    """What a resumed run keeps of the plan that wrote its checkpoint, where it fits."""

    micro_batch: int
    zero_stage: int | None
    """Kept if the micro-batch fits with it; None where any will do."""
    reason: str
    """Why this micro-batch, for a line at the start."""

    def choose(self, candidates: Sequence[Plan]) -> Sequence[Plan]:
        """Those that keep the most; recomputed blocks change memory and time only."""
        same = [plan for plan in candidates if plan[1] == self.micro_batch]
        return [plan for plan in same if plan[0] == self.zero_stage] or same


def choose_batch_plan(
    recipe: Recipe,
    config: UniFormerV2Config,
    world_size: int,
    *,
    precision: Precision,
    available: AvailableMemory,
    earlier: EarlierPlan | None = None,
) -> BatchPlan:
    """The plan that the recipe asks for, with its `auto` fields fitted to the memory.

    It is the plan of the least time a clip, on paper (`StepCost`), of those that fit; of equal ones, that
    with the least recomputation, then the lowest stage. Numbers of the recipe are kept, with advice where
    they do not fit by the estimate. A resumed run keeps the micro-batch of the earlier plan, and its stage,
    where they fit and the recipe allows them: memory may be free now that was not free then, and another plan
    rounds differently.

    Args:
        config: of the model; its recomputed blocks are ignored.
        precision: `engine.precision`, resolved.
        available: of the rank that has least; all ranks must pass the same value, to choose the same plan.
        earlier: of the checkpoint that is resumed.

    Raises:
        RecipeError: the global batch cannot be divided so.
        RunError: something is left to `auto`, and nothing fits.
    """
    engine, batch, group = recipe.engine, recipe.optimisation.global_batch, recipe.clip_group
    stages, notes = _stages(recipe, world_size, precision)
    limit = None if engine.micro_batch == "auto" else engine.micro_batch
    given, _ = split_batch(batch, world_size, limit, group)
    share = batch // world_size
    possible = possible_plans(recipe, config, world_size, precision=precision, available=available)
    choices = replace(
        possible,
        stages=stages,
        sizes=possible.sizes if engine.micro_batch == "auto" else [given],
        blocks=possible.blocks if engine.recomputed_blocks == "auto" else [engine.recomputed_blocks],
    )
    if "auto" not in (engine.zero_stage, engine.micro_batch, engine.recomputed_blocks):
        plan = stages[0], given, choices.blocks[0]
        changes = () if choices.fits(*plan) else advice(possible, *plan)
        return BatchPlan(stages[0], given, share // given, choices.blocks[0], tuple(notes), changes)
    candidates = _candidates(choices)
    if not candidates:
        raise RunError(_nothing_fits(choices, possible))
    kept = [] if earlier is None else earlier.choose(candidates)
    earlier = earlier if kept else None
    ranked = _ranked(kept or candidates, StepCost(choices.memory, share, fp8=engine.fp8))
    found, _ = ranked[0]
    stage, size, recomputed = found
    if engine.micro_batch == "auto":
        if earlier is not None:
            notes.append(f"engine.micro_batch auto: {_clips(size)}, {earlier.reason}")
        else:
            notes.append(_why_micro_batch(choices, *found))
        if config.has_batch_norm:
            notes.append(
                f"batch norms average over {size * world_size} clips, engine.micro_batch x {world_size}, and "
                f"results depend on that: set engine.micro_batch to {size} for the same with other memory"
            )
    if engine.recomputed_blocks == "auto":
        notes.append(_why_recomputed(choices, *found))
    if engine.zero_stage == "auto":
        if earlier is not None and stage == earlier.zero_stage:
            notes.append(f"engine.zero_stage auto: {stage}, as in the checkpoint")
        else:
            notes.append(_why_stage(choices, *found))
    if len(ranked) > 1 and earlier is None:
        notes.append(_why_fastest(choices, ranked))
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


def possible_plans(
    recipe: Recipe,
    config: UniFormerV2Config,
    world_size: int,
    *,
    precision: Precision,
    available: AvailableMemory,
) -> Choices:
    """All plans that an `engine` section may ask for; the global batch must be divisible by the ranks.

    Arguments as those of `choose_batch_plan`.
    """
    group = recipe.clip_group
    groups = recipe.optimisation.global_batch // world_size // group
    return Choices(
        recipe=recipe,
        memory=MemoryModel.of(recipe, config, ranks=world_size, precision=precision, kind=available.kind),
        available=available,
        stages=_possible_stages(recipe, world_size, precision),
        sizes=[size * group for size in range(1, groups + 1) if groups % size == 0],
        blocks=range(config.depth + 1),
    )


def order_of_plans(seconds_per_clip: float, plan: Plan) -> tuple[int, int, int, int]:
    """What plans are ordered by: the time in ns, recomputed blocks, ZeRO stage, the larger micro-batch."""
    stage, size, blocks = plan
    return round(1e9 * seconds_per_clip), blocks, stage, -size


def _candidates(choices: Choices) -> list[Plan]:
    """For each stage and micro-batch, the plan with the fewest recomputed blocks that fits."""
    found = []
    for stage in choices.stages:
        for size in choices.sizes:

            def fits(blocks: int, stage: int = stage, size: int = size) -> bool:
                return choices.fits(stage, size, blocks)

            fewest = bisect_left(choices.blocks, True, key=fits)  # more blocks never need more
            if fewest < len(choices.blocks):
                found.append((stage, size, choices.blocks[fewest]))
    return found


def _ranked(candidates: Sequence[Plan], cost: StepCost) -> list[tuple[Plan, float | None]]:
    """The plans that may be the fastest, with their seconds a clip, fastest first.

    None is the time of a plan that is at least as good as all others in stage, micro-batch and recomputed
    blocks. Then it is the only one, and no kernels need to be counted, which takes a second or two.
    """
    left = [plan for plan in candidates if not any(_is_better(other, plan) for other in candidates)]
    if len(left) == 1:
        return [(left[0], None)]
    seconds = {plan: cost.seconds_per_clip(*plan) for plan in left}
    return [
        (plan, seconds[plan]) for plan in sorted(left, key=lambda plan: order_of_plans(seconds[plan], plan))
    ]


def _is_better(plan: Plan, other: Plan) -> bool:
    """Whether a plan is no worse than another in stage, micro-batch and recomputed blocks, and not equal."""
    stage, size, blocks = plan
    return plan != other and stage <= other[0] and size >= other[1] and blocks <= other[2]


def _why_fastest(choices: Choices, ranked: Sequence[tuple[Plan, float | None]]) -> str:
    """The times of the fastest plan and of others."""
    depth = choices.memory.config.depth
    (first, seconds), *others = (
        (f"micro-batch {size}, {blocks} of {depth} blocks recomputed, ZeRO {stage}", 1000 * (seconds or 0.0))
        for (stage, size, blocks), seconds in ranked
    )
    return (
        f"{first}: {seconds:.1f} ms a clip on paper ({describe_device(choices.memory)}), the fastest that "
        "fits; others: " + "; ".join(f"{plan}: {slower:.1f} ms" for plan, slower in others[:2])
    )


def _why_micro_batch(choices: Choices, stage: int, size: int, recomputed: int) -> str:
    """Why the micro-batch is not larger."""
    need = _out_of(choices, choices.estimate(stage, size, recomputed))
    text = f"engine.micro_batch auto: {_clips(size)}, {need}"
    if size == choices.sizes[-1]:
        return f"{text}; that is a rank's whole share of the global batch"
    larger = choices.sizes[choices.sizes.index(size) + 1]
    least = choices.least(larger)
    if least.total > choices.available.bytes:
        return f"{text}; {larger} would need {format_bytes(least.total)}{_even_with(choices)}"
    same = choices.estimate(stage, larger, recomputed)
    return (
        f"{text}; {larger} would need {format_bytes(same.total)}, or more recomputed blocks, or a higher "
        "ZeRO stage"
    )


def _why_recomputed(choices: Choices, stage: int, size: int, recomputed: int) -> str:
    """Why not fewer blocks are recomputed."""
    text = f"engine.recomputed_blocks auto: {recomputed} of {choices.memory.config.depth}"
    if recomputed == 0:
        return f"{text}, {_clips(size)} fit without recomputation"
    fewer = choices.estimate(stage, size, recomputed - 1)
    return f"{text}; with {recomputed - 1}, {_clips(size)} would need {_out_of(choices, fewer)}"


def _why_stage(choices: Choices, stage: int, size: int, recomputed: int) -> str:
    """Why the stage is not lower."""
    text = f"engine.zero_stage auto: {stage}"
    if len(choices.stages) == 1:
        return f"{text}, there is one rank only"
    if stage == choices.stages[0]:
        return f"{text}, nothing more needs to be partitioned"
    lower = choices.estimate(stage - 1, size, recomputed)
    return f"{text}; with {stage - 1}, {_clips(size)} would need {_out_of(choices, lower)}"


def _nothing_fits(choices: Choices, possible: Choices) -> str:
    size, engine = choices.sizes[0], choices.recipe.engine
    least = choices.least(size)
    helps = advice(possible, choices.stages[-1], size, choices.blocks[-1])
    given = [
        f"engine.{name} {value}"
        for name in ("zero_stage", "micro_batch", "recomputed_blocks")
        if (value := getattr(engine, name)) != "auto"
    ]
    asked = f" with {' and '.join(given)}" if given else ""
    return (
        f"the training does not fit{asked}: {_clips(size)} per rank and forward pass would need "
        f"{_out_of(choices, least)}{_even_with(choices)} ({format_bytes(least.states)} of weights, gradients "
        f"and optimiser, {format_bytes(least.working)} of activations and buffers, "
        f"{format_bytes(least.clips)} of clips made ahead, {format_bytes(least.reserve)} in reserve). What "
        f"helps: {'; or '.join(helps)}"
    )


def _even_with(choices: Choices) -> str:
    measures = [f"all {choices.memory.config.depth} blocks recomputed"] if len(choices.blocks) > 1 else []
    measures += ["any ZeRO stage"] if len(choices.stages) > 1 else []
    return f" even with {' and '.join(measures)}" if measures else ""


def _out_of(choices: Choices, estimate: MemoryEstimate) -> str:
    return f"{format_bytes(estimate.total)} of {format_bytes(choices.available.bytes)}"


def _clips(count: int) -> str:
    return f"{count} clip{'s' if count > 1 else ''}"
