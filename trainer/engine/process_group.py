"""The process group of all ranks, for torch alone and for DeepSpeed."""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from trainer.distributed.environment import Environment
from trainer.distributed.rendezvous import rendezvous_address, restrict_gloo_to_loopback, wait_for_all_ranks
from trainer.engine.deepspeed_private import import_deepspeed, use_group
from trainer.errors import RunError, StartAgain
from trainer.system.timeouts import run_with_timeout

COLLECTIVE_MINUTES = 30.0  # that ranks wait for one another at least, rendering included
RENDEZVOUS_MINUTES = 10.0  # within which all ranks must have joined, where no recipe gives another limit


def connect(
    environment: Environment,
    patience: float = COLLECTIVE_MINUTES,
    rendezvous: float = RENDEZVOUS_MINUTES,
) -> None:
    """Join the process group of all ranks as `join` does, and have DeepSpeed work in it."""
    deepspeed = import_deepspeed(environment.device)
    if dist.is_initialized():
        return
    copy = join(environment, patience, rendezvous)
    # It uses the existing group, and makes none.
    deepspeed.init_distributed(
        dist_backend=_backend(environment), timeout=timedelta(minutes=patience), verbose=False
    )
    # Its engines would work in a copy of the group with torch's timeout: 10 minutes with NCCL, whose own
    # watchdog then kills the process.
    use_group(copy)


def join(
    environment: Environment,
    patience: float = COLLECTIVE_MINUTES,
    rendezvous: float = RENDEZVOUS_MINUTES,
) -> Any:
    """Join the process group of all ranks; returns a copy of the group.

    Args:
        environment: its `env://` variables must be set.
        patience: minutes that a rank waits for the others in a collective.
        rendezvous: minutes within which all ranks must have joined; within as many more they must be
            connected.

    Raises:
        RunError: the ranks cannot meet, as when another run has their port.
        StartAgain: some rank does not join, or the ranks cannot be connected.
    """
    backend = _backend(environment)
    timeout = timedelta(minutes=patience)
    address, port = rendezvous_address(environment)
    restrict_gloo_to_loopback(environment)
    try:
        store = wait_for_all_ranks(environment, address, port, 60 * rendezvous)
    except (dist.DistNetworkError, OSError) as error:
        raise RunError(
            f"the ranks cannot meet at {address}:{port}: {str(error).splitlines()[0]}. If another run of "
            "this machine uses that port, name a free one: deepspeed --master_port 29501 launch/train.py ..."
        ) from error
    store.set_timeout(timeout)
    met = f"all {environment.world_size} ranks met, but {backend}"
    try:
        return run_with_timeout(
            60 * rendezvous, lambda: _join(environment, backend, store, timeout), "process group"
        )
    except TimeoutError as error:
        raise StartAgain(
            f"{met} did not connect them within {rendezvous:g} minutes (run.rendezvous_minutes); "
            "NCCL_DEBUG=INFO logs where it waits, NCCL_SOCKET_IFNAME names the network to use"
        ) from error
    except RuntimeError as error:  # of many kinds, as when a node dies now
        reason = " ".join(str(error).split())
        raise StartAgain(f"{met} could not connect them: {reason}; NCCL_DEBUG=INFO logs more") from error


def _backend(environment: Environment) -> str:
    return "nccl" if environment.device.type == "cuda" else "gloo"


def _join(environment: Environment, backend: str, store: dist.Store, timeout: timedelta) -> Any:
    """Make the group of all ranks; returns a copy of it, with the same timeout."""
    on_gpu = environment.device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(environment.device)  # of this thread
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("default_pg", store),
        rank=environment.rank,
        world_size=environment.world_size,
        timeout=timeout,
        # As DeepSpeed itself would: groups are then split off this one, instead of connected again.
        device_id=environment.device if on_gpu and environment.world_size > 1 else None,
    )
    return dist.new_group(timeout=timeout)


def disconnect() -> None:
    """Leave the process group, where one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()
