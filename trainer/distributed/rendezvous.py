"""Rendezvous of all ranks within a time limit; the error names the missing ranks and their nodes.

torch.distributed alone waits for half an hour and then reports a number of sockets only.

Rank 0 hosts the store that the process group uses afterwards. Every rank writes its node's name to the store
and increments a counter. Rank 0 polls the counter. It reads the ranks' names only after the time limit. The
others wait for one key, `result`: rank 0 serves a few small requests per rank.
"""

import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import partial

import torch.distributed as dist

from trainer.distributed.environment import Environment
from trainer.errors import AgreedError, RunError, StartAgain
from trainer.system.formatting import format_ranks
from trainer.system.timeouts import run_with_timeout

_LOOPBACK = "127.0.0.1"
_LOOPBACK_INTERFACE = "lo"
_BACKLOG = 2048  # connections that wait to be accepted: all ranks connect at once
_COMPLETE = "complete"
_POLL_EVERY = 0.05  # seconds between rank 0's reads of the counter, in its own memory
_RESULT_TIMEOUT = 10.0  # seconds for the result to reach all connected ranks
_MAX_NAMED = 8  # nodes in a message


class MissingRanksError(AgreedError, StartAgain):
    """Ranks are missing; raised with the same message on all ranks that are present."""


def rendezvous_address(environment: Environment) -> tuple[str, int]:
    """Rank 0's address and port: MASTER_ADDR, or loopback if all ranks are on one node, and MASTER_PORT."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return _LOOPBACK if environment.one_node and not _agent_listens() else address, port


def restrict_gloo_to_loopback(environment: Environment) -> None:
    """Have gloo listen on loopback, not on the host's address, where all ranks are on one node."""
    if environment.one_node and _LOOPBACK_INTERFACE in [name for _, name in socket.if_nameindex()]:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK_INTERFACE)


def _agent_listens() -> bool:
    """Whether torchrun's agent hosts the store, not rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def wait_for_all_ranks(environment: Environment, address: str, port: int, limit: float) -> dist.Store:
    """Wait until all ranks are connected; returns the store that they share.

    Args:
        environment: this rank's placement.
        address: of rank 0, which listens on loopback only if this is loopback, else on all addresses.
        port: of rank 0; a single process uses a free one instead.
        limit: seconds, on rank 0 from its start, on the others until they are connected.

    Raises:
        MissingRanksError: ranks are missing; the same message on all ranks that are present.
        StartAgain: this rank cannot connect to rank 0, or lost the connection.
        RunError: another run uses this address and port.
        dist.DistNetworkError, OSError: rank 0 cannot listen.
    """
    if environment.is_main and not _agent_listens():
        if environment.launcher == "alone":
            port = 0
        store = run_with_timeout(limit, lambda: _host(address, port, limit), "rendezvous")
    else:
        store = _reach(environment, address, port, limit)
    keys = dist.PrefixStore(_name(environment), store)
    try:
        result = run_with_timeout(
            limit + _RESULT_TIMEOUT, lambda: _register(keys, environment, limit), "rendezvous"
        )
    except (dist.DistError, TimeoutError) as error:
        raise StartAgain(
            f"rank {environment.rank} ({environment.node}) connected to rank 0 at {address}:{port}, "
            "but rank 0 did not report whether all ranks arrived: see its log"
        ) from error
    if result != _COMPLETE:
        raise MissingRanksError(result)
    return store


def _host(address: str, port: int, seconds: float) -> dist.TCPStore:
    """Start the store. It has no authentication, so it listens on loopback where that is enough.

    port: 0, on loopback, binds a free port and sets MASTER_PORT. Searching for a free port first would leave
    time for another process to bind it.
    """
    patience = timedelta(seconds=seconds)
    if address not in (_LOOPBACK, "localhost"):
        return dist.TCPStore(address, port, None, True, patience, wait_for_workers=False)
    # A TCPStore without this socket would listen on all addresses.
    listener = socket.create_server((_LOOPBACK, port), backlog=_BACKLOG)
    if port == 0:
        port = int(listener.getsockname()[1])
        os.environ["MASTER_PORT"] = str(port)
    return dist.TCPStore(
        _LOOPBACK, port, None, True, patience, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def _reach(environment: Environment, address: str, port: int, limit: float) -> dist.TCPStore:
    """Connect to rank 0, which may start later. Raises StartAgain after `limit` seconds."""
    deadline = time.monotonic() + limit
    answers = False
    try:
        # torch's client retries as well, but prints a page of C++ frames for each failure.
        _await_listener(address, port, deadline, pause=0.2 + 0.05 * (environment.rank % 16))
        answers = True
        left = max(1.0, deadline - time.monotonic())
        # torch's client waits forever for an answer and ignores Ctrl-C meanwhile.
        limits = timedelta(seconds=left)
        join = partial(dist.TCPStore, address, port, None, False, limits, wait_for_workers=False)
        return run_with_timeout(left, join, "rendezvous")
    except (OSError, dist.DistError) as error:
        what = (
            "something listens there, but does not answer as rank 0 does"
            if answers
            else (str(error) or "no answer")
        )
        node = f" of {environment.nodes[0]}" if environment.nodes else ""
        raise StartAgain(
            f"rank {environment.rank} ({environment.node}) cannot connect to rank 0 at {address}:{port} "
            f"within {limit / 60:g} minutes: {what}. Either rank 0{node} did not start, ended or is behind "
            "a firewall (see its log), or another program uses that port: set MASTER_PORT to a free one"
        ) from error


def _await_listener(address: str, port: int, deadline: float, pause: float) -> None:
    """Wait until something listens. Raises the last OSError at the deadline."""
    while True:
        try:
            left = max(1.0, deadline - time.monotonic())
            socket.create_connection((address, port), timeout=min(5.0, left)).close()
        except OSError:
            if time.monotonic() + pause >= deadline:
                raise
            time.sleep(pause)
        else:
            return


def _name(environment: Environment) -> str:
    """Prefix of this run's keys: by mistake, two runs may use one port."""
    names = {
        "srun": ("SLURM_JOB_ID", "SLURM_STEP_ID"),
        "torchrun": ("TORCHELASTIC_RUN_ID",),
        "mpi": ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    }
    ids = [os.environ.get(name, "") for name in names.get(environment.launcher, ())]
    return "/".join(["rendezvous", *ids, str(environment.world_size)])


def _register(keys: dist.Store, environment: Environment, limit: float) -> str:
    """Register this rank, and wait for the result. Raises RunError if the rank is registered already."""
    rank = environment.rank
    if keys.check([f"present/{rank}"]):
        raise RunError(
            f"rank {rank} ({environment.node}) found another run at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')}, where a rank {rank} is registered: set MASTER_PORT, or "
            "deepspeed --master_port, to a free port"
        )
    keys.set(f"present/{rank}", environment.node)
    keys.add("count", 1)
    if environment.is_main:
        return _collect(keys, environment, limit)
    keys.wait(["result"], timedelta(seconds=limit + _RESULT_TIMEOUT))
    result = keys.get("result").decode()
    if result != _COMPLETE:
        keys.add("read", 1)
    return result


def _collect(keys: dist.Store, environment: Environment, limit: float) -> str:
    """On rank 0: wait for all ranks, and set the result. An error is set until the others have read it."""
    world_size = environment.world_size
    present: Sequence[int] = range(world_size)
    if not _wait_for_count(keys, "count", world_size, limit):
        present = [rank for rank in present if keys.check([f"present/{rank}"])]
    if len(present) == world_size:
        keys.set("result", _COMPLETE)
        return _COMPLETE
    # With another distribution of ranks than SLURM's default, `environment.nodes` is wrong.
    places = {rank: keys.get(f"present/{rank}").decode() for rank in present}
    known = bool(environment.nodes) and all(environment.nodes[rank] == places[rank] for rank in present)
    result = format_missing_ranks(present, world_size, limit, environment.nodes if known else ())
    keys.set("result", result)
    _wait_for_count(keys, "read", len(present) - 1, _RESULT_TIMEOUT / 2)
    return result


def _wait_for_count(keys: dist.Store, key: str, number: int, seconds: float) -> bool:
    """Wait until a counter reaches `number`; False after `seconds`."""
    deadline = time.monotonic() + seconds
    while keys.add(key, 0) < number:
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_EVERY)
    return True


def format_missing_ranks(present: Sequence[int], world_size: int, limit: float, nodes: Sequence[str]) -> str:
    """Which ranks are missing, on which nodes, and what to do.

    nodes: each rank's node, empty where unknown.
    """
    here = set(present)
    missing = [rank for rank in range(world_size) if rank not in here]
    begin = f"{len(here)} of {world_size} ranks connected within {limit / 60:g} minutes: "
    more = "or give them more time with run.rendezvous_minutes"
    if not nodes:
        return f"{begin}missing {format_ranks(missing)}. See their logs, {more}"
    there = {nodes[rank] for rank in here}
    by_node: dict[str, list[int]] = {}
    for rank in missing:
        by_node.setdefault(nodes[rank], []).append(rank)
    parts = [
        f"missing {'of ' if node in there else ''}node {node}: {format_ranks(ranks)}"
        for node, ranks in list(by_node.items())[:_MAX_NAMED]
    ]
    if len(by_node) > _MAX_NAMED:
        parts.append(f"and {len(by_node) - _MAX_NAMED} more nodes")
    absent = [node for node in by_node if node not in there]
    # If many are missing, the nodes are not the cause: excluding them would not help.
    leave_out = (
        f"exclude broken nodes with sbatch --exclude={','.join(absent)}, "
        if 0 < len(absent) <= _MAX_NAMED
        else ""
    )
    return f"{begin}{'; '.join(parts)}. See the logs of these ranks, {leave_out}{more}"
