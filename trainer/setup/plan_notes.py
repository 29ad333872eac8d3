"""What a run says about its batch plan at the start, apart from the reasons of the choice."""

import dataclasses

import torch

from models import UniFormerV2Config
from trainer.checkpoint.metadata import TrainState
from trainer.config.schema import Recipe
from trainer.engine.batch_plan import BatchPlan
from trainer.engine.memory_estimate import MemoryModel
from trainer.engine.step_cost import StepCost, describe_device
from trainer.system.device import choose_precision


def memory_notes(layout: BatchPlan) -> tuple[str, ...]:
    """A note where the estimate of the batch plan exceeds the memory."""
    if not layout.advice:
        return ()
    return (f"the estimate exceeds the available memory. Possible remedies: {'; or '.join(layout.advice)}",)


def plan_change_notes(
    recipe: Recipe, layout: BatchPlan, state: TrainState, world_size: int
) -> tuple[str, ...]:
    """A note where `auto` has chosen another plan than the checkpoint's of so many ranks."""
    engine = recipe.engine
    if state.micro_batch is None or state.world_size != world_size:
        return ()
    then, now = (state.micro_batch, state.zero_stage), (layout.micro_batch, layout.zero_stage)
    if then == now or "auto" not in (engine.micro_batch, engine.zero_stage):
        return ()
    return (
        f"micro-batch {now[0]} and ZeRO stage {now[1]}; the checkpoint was written with {then[0]} and "
        f"{then[1]}, which do not fit or differ from the recipe: results differ by rounding from those of a "
        "run that was not stopped",
    )


def fp8_notes(
    recipe: Recipe, config: UniFormerV2Config, layout: BatchPlan, world_size: int, kind: str
) -> tuple[str, ...]:
    """A note where products in FP8 make a step slower, on paper. kind: of device. Takes seconds."""
    engine = recipe.engine
    if not engine.fp8:
        return ()
    precision = choose_precision(engine.precision, torch.device(kind))
    memory = MemoryModel.of(recipe, config, ranks=world_size, precision=precision, kind=kind)
    share = layout.micro_batch * layout.accumulation
    plan = layout.zero_stage, layout.micro_batch, layout.recomputed_blocks

    def milliseconds(*, fp8: bool, compiled: bool) -> float:
        cost = StepCost(dataclasses.replace(memory, compiled=compiled), share, fp8)
        return 1000 * cost.seconds_per_clip(*plan)

    slow, plain = (milliseconds(fp8=fp8, compiled=engine.compile) for fp8 in (True, False))
    if slow <= 1.01 * plain:
        return ()
    remedies = ["set engine.fp8 to false"]
    if not engine.compile and layout.zero_stage < 3:
        compiled = milliseconds(fp8=True, compiled=True)
        if compiled < milliseconds(fp8=False, compiled=True):
            remedies.insert(0, f"set engine.compile to true ({compiled:.1f} ms)")
    return (
        f"engine.fp8 makes a step slower on paper: {slow:.1f} ms a clip, {plain:.1f} without "
        f"({describe_device(memory)}): {', or '.join(remedies)}",
    )
