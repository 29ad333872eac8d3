"""Which launcher started this process, and the place it gave."""

from collections.abc import Mapping

from trainer.distributed.mpi import find_mpi_placement
from trainer.distributed.rank_placement import RankPlacement, beside_starter, from_variables, is_launched
from trainer.distributed.slurm_step import find_srun_placement, is_srun_task, step_tasks
from trainer.errors import RunError


def find_placement(variables: Mapping[str, str]) -> RankPlacement | None:
    """Where what started this process puts it; None where it is alone.

    Raises RunError where the variables are incomplete, are no numbers, or contradict each other.
    """
    if is_launched(variables):
        return from_variables(variables)
    srun = is_srun_task(variables)
    place = find_mpi_placement(variables, step_tasks(variables) if srun else None)
    if place is None and srun:
        place = find_srun_placement(variables)
    if place is not None:
        return beside_starter(place, variables)
    if variables.get("RANK") or variables.get("WORLD_SIZE"):
        return from_variables(variables)
    return None


def find_rank(variables: Mapping[str, str]) -> tuple[int, str]:
    """The rank and the launcher, for messages; 0 and `alone` where the variables do not say them."""
    try:
        place = find_placement(variables)
    except RunError:
        place = None
    return (0, "alone") if place is None else (place.rank, place.launcher)
