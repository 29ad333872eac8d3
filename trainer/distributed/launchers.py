"""Which launcher started this process, the placement it gave, and which ranks print an error."""

import sys
from collections.abc import Mapping

from trainer.distributed.mpi import find_mpi_placement
from trainer.distributed.rank_placement import RankPlacement, is_launched, read_placement, resolve_placement
from trainer.distributed.slurm_step import find_srun_placement, is_srun_task, step_tasks
from trainer.errors import AgreedError, RecipeError, RunError


def find_placement(variables: Mapping[str, str]) -> RankPlacement | None:
    """The placement that the launcher gave this process; None where it runs alone.

    Raises RunError where the variables are incomplete, are no numbers, or contradict each other.
    """
    if is_launched(variables):
        return read_placement(variables)
    srun = is_srun_task(variables)
    place = find_mpi_placement(variables, step_tasks(variables) if srun else None)
    if place is None and srun:
        place = find_srun_placement(variables)
    if place is not None:
        return resolve_placement(place, variables)
    if variables.get("RANK") or variables.get("WORLD_SIZE"):
        return read_placement(variables)
    return None


def find_rank(variables: Mapping[str, str]) -> tuple[int, str]:
    """The rank and the launcher, for messages; 0 and `alone` where the variables do not give them."""
    try:
        place = find_placement(variables)
    except RunError:
        place = None
    return (0, "alone") if place is None else (place.rank, place.launcher)


def print_error(error: Exception, variables: Mapping[str, str]) -> None:
    """Print an error of the user's to standard error, unless another rank prints it.

    variables: the process's environment.
    """
    rank, launcher = find_rank(variables)
    # A mistake in the recipe, or an error agreed by the ranks, is the same on all: one message is enough.
    if rank == 0:
        print(f"error: {error}", file=sys.stderr)
    elif isinstance(error, AgreedError):
        return
    # mpirun kills rank 0 when another rank ends, perhaps before rank 0 has printed the error.
    elif launcher == "mpi" or not isinstance(error, RecipeError):
        print(f"error on rank {rank}: {error}", file=sys.stderr)
