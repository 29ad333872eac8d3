"""A process's placement among the ranks, as its launcher gives it."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from trainer.errors import RunError


@dataclass(frozen=True)
class RankPlacement:
    """Rank, node and world size of a process."""

    rank: int
    """Number of this process among all, from 0."""
    local_rank: int
    """Number of this process among those on its node, from 0."""
    world_size: int
    """Processes in all."""
    local_world_size: int
    """Processes on this node."""
    launcher: str
    """`alone`, `torchrun`, `deepspeed`, `srun`, `mpi`; `variables`: an unknown one that set RANK and more."""
    starter: str
    """The launcher's name in messages."""
    local_size_known: bool = True
    """Whether the launcher gave the number of processes on this node; otherwise all are assumed to be."""
    node_rank: int | None = None
    """Number of this node; None where unknown."""
    nodes: tuple[str, ...] = ()
    """Each rank's node; empty where unknown."""
    notes: tuple[str, ...] = field(default=())
    """Variables that were ignored or assumed, as lines for the user."""

    def __post_init__(self) -> None:
        """Raises RunError where the numbers contradict each other."""
        for low, high in (
            (("RANK", self.rank), ("WORLD_SIZE", self.world_size)),
            (("LOCAL_RANK", self.local_rank), ("LOCAL_WORLD_SIZE", self.local_world_size)),
        ):
            if low[1] >= high[1]:
                raise RunError(
                    f"{low[0]} is {low[1]} but {high[0]} is {high[1]} ({self.starter}): it must be smaller"
                )
        if self.local_world_size > self.world_size:
            raise RunError(
                f"LOCAL_WORLD_SIZE is {self.local_world_size} but WORLD_SIZE only {self.world_size} "
                f"({self.starter})"
            )

    @property
    def one_node(self) -> bool:
        """Whether all processes are on this node, as far as known."""
        return self.local_world_size == self.world_size


LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def read_placement(variables: Mapping[str, str]) -> RankPlacement:
    """The placement that RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT give.

    Raises RunError where some of them are missing, are no numbers, or contradict each other.
    """
    missing = [name for name in LAUNCHED if not variables.get(name)]
    if missing:
        present = [name for name in LAUNCHED if variables.get(name)]
        raise RunError(
            f"{', '.join(present)} set but {', '.join(missing)} not: start with `deepspeed`, `torchrun`, "
            f"`srun` or `mpirun`, which set them all, or unset them to run alone"
        )
    launcher = _launcher(variables)
    world_size = read_number(variables, "WORLD_SIZE", least=1)
    # The deepspeed launcher sets LOCAL_SIZE, torchrun LOCAL_WORLD_SIZE.
    local = next((name for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE") if variables.get(name)), None)
    return RankPlacement(
        rank=read_number(variables, "RANK"),
        local_rank=read_number(variables, "LOCAL_RANK"),
        world_size=world_size,
        local_world_size=world_size if local is None else read_number(variables, local, least=1),
        launcher=launcher,
        starter=launcher,
        local_size_known=local is not None,
    )


def _launcher(variables: Mapping[str, str]) -> str:
    if "TORCHELASTIC_RUN_ID" in variables:
        return "torchrun"
    return "deepspeed" if "CROSS_SIZE" in variables else "variables"


def is_launched(variables: Mapping[str, str]) -> bool:
    """Whether torchrun or the deepspeed launcher started this process."""
    return _launcher(variables) != "variables" and all(variables.get(name) for name in LAUNCHED)


def resolve_placement(place: RankPlacement, variables: Mapping[str, str]) -> RankPlacement:
    """Choose between a launcher's own numbers and RANK and the others, which a shell or script may have set.

    A launcher such as srun numbers its processes itself; what the shell exports is the same for all of them
    and cannot be their rank. A complete set with a larger WORLD_SIZE comes from a program that the launcher
    started and that starts several processes itself.

    Raises RunError, on all ranks, where WORLD_SIZE contradicts the launcher.
    """
    complete = all(variables.get(name) for name in LAUNCHED)
    if variables.get("WORLD_SIZE"):
        said = read_number(variables, "WORLD_SIZE", least=1)
        if complete and (said > place.world_size or place.world_size == 1):
            return read_placement(variables)
        if said != place.world_size:
            raise RunError(
                f"WORLD_SIZE is {said}, but {place.starter} started {place.world_size} process"
                f"{'es' if place.world_size > 1 else ''}: unset WORLD_SIZE, RANK and LOCAL_RANK in the shell "
                f"or script that starts this, or start {said} processes with {place.starter}"
            )
    stale = [
        f"{name}={variables[name]}"
        for name, own in (("RANK", place.rank), ("LOCAL_RANK", place.local_rank))
        if variables.get(name) and variables[name].strip() != str(own)
    ]
    if not stale:
        return place
    note = f"{', '.join(stale)} of the environment is ignored: {place.starter} numbers its processes itself"
    return replace(place, notes=(*place.notes, note))


def read_number(variables: Mapping[str, str], name: str, least: int = 0) -> int:
    """The value of a variable that is set. Raises RunError unless it is an integer of at least `least`."""
    text = variables[name].strip()
    # int() alone accepts `1_0` and digits of other scripts.
    if not (text.isascii() and text.isdigit() and len(text) < 19) or int(text) < least:
        raise RunError(f"{name} is {variables[name]!r}; allowed: a whole number, at least {least}")
    return int(text)
