"""What each of many processes says of an error that its maker can mend."""

import sys
from collections.abc import Mapping

from trainer.distributed.launchers import find_rank
from trainer.errors import AgreedError, RecipeError


def print_error(error: Exception, variables: Mapping[str, str]) -> None:
    """Print it on standard error, unless another rank does. variables: the process's environment."""
    rank, launcher = find_rank(variables)
    # A mistake in the recipe, or one the ranks agreed on, is the same on all: one message is enough.
    if rank == 0:
        print(f"error: {error}", file=sys.stderr)
    elif isinstance(error, AgreedError):
        return
    # mpirun ends rank 0 when another rank is gone, be it before rank 0 has said why.
    elif launcher == "mpi" or not isinstance(error, RecipeError):
        print(f"error on rank {rank}: {error}", file=sys.stderr)
