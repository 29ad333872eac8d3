"""How the work is laid out on the devices: ZeRO stage, micro-batch, accumulation, recomputed blocks."""

from dataclasses import dataclass

from trainer import RecipeError
from trainer.engine.batch_split import split_batch
from trainer.recipe.schema import Recipe


@dataclass(frozen=True)
class Layout:
    """What the recipe's `engine` section comes to for so many ranks.

    zero_stage: what is partitioned over the ranks. micro_batch: clips per rank and forward pass.
    accumulation: micro-batches per optimiser step. recomputed_blocks: of the backbone. why: a line for each
    choice that was left to `auto`.
    """

    zero_stage: int
    micro_batch: int
    accumulation: int
    recomputed_blocks: int
    why: tuple[str, ...] = ()


def choose_layout(recipe: Recipe, world_size: int) -> Layout:
    """The layout that the recipe asks for.

    Raises RecipeError for a global batch that cannot be divided so.
    """
    engine = recipe.engine
    if "auto" in (engine.zero_stage, engine.micro_batch, engine.recomputed_blocks):
        raise RecipeError("engine: auto is not there yet")
    assert engine.micro_batch != "auto" and engine.zero_stage != "auto" and engine.recomputed_blocks != "auto"
    micro_batch, accumulation = split_batch(
        recipe.optimisation.global_batch, world_size, engine.micro_batch, recipe.sampling.repeats
    )
    return Layout(engine.zero_stage, micro_batch, accumulation, engine.recomputed_blocks)
