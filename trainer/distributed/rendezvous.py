"""All ranks meet within a time limit, and where some do not come, all that came say which, and of what node.

torch.distributed alone waits for half an hour, and then tells how many sockets it has not seen.

Rank 0 hosts the store that the process group uses afterwards. Every rank writes its node's name there and
counts itself in; rank 0 looks at the count, and only where it stays short at who is missing. The others wait
for one key, the verdict, in one request: a thousand ranks cost rank 0 a few thousand small ones in all.
"""

import os
import socket
import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from trainer.distributed.environment import Environment
from trainer.errors import AgreedError, RunError, StartAgain
from trainer.system.formatting import format_ranks
from trainer.system.timeouts import run_with_timeout

_LOOPBACK = "127.0.0.1"
_LOOPBACK_INTERFACE = "lo"
_WAITING = 2048  # connections that may wait to be accepted: all ranks come at once
_ALL_CAME = "all came"
_LOOK_EVERY = 0.05  # seconds between two looks of rank 0 at the count, in its own memory
_HEARING_TAKES = 10.0  # seconds that a verdict needs to reach all that came
_NAMED = 8  # nodes that a message names


class MissingRanksError(AgreedError, StartAgain):
    """Ranks did not come, as all know that came."""


def rendezvous_address(environment: Environment) -> tuple[str, int]:
    """The address and port at which the ranks meet: those of the environment's variables, and loopback where
    all ranks are on one node.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return _LOOPBACK if environment.one_node and not _agent_listens() else address, port


def restrict_gloo_to_loopback(environment: Environment) -> None:
    """Have gloo listen on loopback, not on the host's address, where all ranks are on one node."""
    if environment.one_node and _LOOPBACK_INTERFACE in [name for _, name in socket.if_nameindex()]:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", _LOOPBACK_INTERFACE)


def _agent_listens() -> bool:
    """With torchrun, its agent listens, and rank 0 is a guest like the others."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def wait_for_all_ranks(environment: Environment, address: str, port: int, limit: float) -> dist.Store:
    """Wait until all ranks are there; returns the store that they share.

    Args:
        environment: this rank's place.
        address: where rank 0 listens; on loopback only where this is loopback, else on all addresses.
        port: the same; a run alone takes a free one in its place.
        limit: seconds, counted by rank 0 from its own coming, and by the others until they reach it.

    Raises:
        MissingRanksError: ranks did not come; the same words on all that came.
        StartAgain: this rank cannot reach rank 0, or lost it.
        RunError: it met another run there.
        dist.DistNetworkError, OSError: on rank 0, which cannot listen there.
    """
    if environment.is_main and not _agent_listens():
        if environment.launcher == "alone":
            port = 0
        store = run_with_timeout(limit, lambda: _host(address, port, limit), "rendezvous")
    else:
        store = _reach(environment, address, port, limit)
    meeting = dist.PrefixStore(_name(environment), store)
    try:
        verdict = run_with_timeout(
            limit + _HEARING_TAKES, lambda: _attend(meeting, environment, limit), "rendezvous"
        )
    except (dist.DistError, TimeoutError) as error:
        raise StartAgain(
            f"rank {environment.rank} ({environment.node}) reached rank 0 at {address}:{port}, but was "
            "not told whether all ranks came: rank 0 is gone or does not answer; its log says why"
        ) from error
    if verdict != _ALL_CAME:
        raise MissingRanksError(verdict)
    return store


def _host(address: str, port: int, seconds: float) -> dist.TCPStore:
    """Listen. Whoever reaches the store can write to it, so it listens no further than it has to.

    port: 0 on loopback takes a free one, and says it in MASTER_PORT: a run alone needs no certain one, and
    between a look for a free one and its use another process may have taken it.
    """
    patience = timedelta(seconds=seconds)
    if address not in (_LOOPBACK, "localhost"):
        return dist.TCPStore(address, port, None, True, patience, wait_for_workers=False)
    # torch's own would listen on all addresses.
    listener = socket.create_server((_LOOPBACK, port), backlog=_WAITING)
    if port == 0:
        port = int(listener.getsockname()[1])
        os.environ["MASTER_PORT"] = str(port)
    return dist.TCPStore(
        _LOOPBACK, port, None, True, patience, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def _join(address: str, port: int, seconds: float) -> dist.TCPStore:
    return dist.TCPStore(address, port, None, False, timedelta(seconds=seconds), wait_for_workers=False)


def _reach(environment: Environment, address: str, port: int, limit: float) -> dist.TCPStore:
    """Connect to rank 0, which may start later. Raises StartAgain when it is not there by the limit."""
    deadline = time.monotonic() + limit
    answers = False
    try:
        # torch's client tries again, too, but shows a page of C++ frames for each time it failed.
        _await_listener(address, port, deadline, pause=0.2 + 0.05 * (environment.rank % 16))
        answers = True
        left = max(1.0, deadline - time.monotonic())
        # torch's client waits for ever for a word from whatever has the port, and no Ctrl-C reaches it there.
        return run_with_timeout(left, lambda: _join(address, port, left), "rendezvous")
    except (OSError, dist.DistError) as error:
        what = (
            "something listens there, but does not answer as rank 0 does"
            if answers
            else (str(error) or "no answer")
        )
        node = f" of {environment.nodes[0]}" if environment.nodes else ""
        raise StartAgain(
            f"rank {environment.rank} ({environment.node}) cannot reach rank 0 at {address}:{port} within "
            f"{limit / 60:g} minutes: {what}. Either rank 0{node} is not there, not any more, or lets nobody "
            "in, which its log tells, or something else has that port: name a free one in MASTER_PORT"
        ) from error


def _await_listener(address: str, port: int, deadline: float, pause: float) -> None:
    """Raises OSError, the last one, when nobody listens by the deadline."""
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
    """Under which this run meets: a port may belong to another run's store by mistake."""
    names = {
        "srun": ("SLURM_JOB_ID", "SLURM_STEP_ID"),
        "torchrun": ("TORCHELASTIC_RUN_ID",),
        "mpi": ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    }
    ids = [os.environ.get(name, "") for name in names.get(environment.launcher, ())]
    return "/".join(["meeting", *ids, str(environment.world_size)])


def _attend(meeting: dist.Store, environment: Environment, limit: float) -> str:
    """Come, and wait for the verdict."""
    rank = environment.rank
    if meeting.check([f"arrived/{rank}"]):
        raise RunError(
            f"rank {rank} ({environment.node}) meets another run at {os.environ.get('MASTER_ADDR')}:"
            f"{os.environ.get('MASTER_PORT')}, where a rank {rank} has come before it: name a free port in "
            "MASTER_PORT, or with deepspeed --master_port"
        )
    meeting.set(f"arrived/{rank}", environment.node)
    meeting.add("count", 1)
    if environment.is_main:
        return _preside(meeting, environment, limit)
    meeting.wait(["verdict"], timedelta(seconds=limit + _HEARING_TAKES))
    verdict = meeting.get("verdict").decode()
    if verdict != _ALL_CAME:
        meeting.add("heard", 1)
    return verdict


def _preside(meeting: dist.Store, environment: Environment, limit: float) -> str:
    """Rank 0's part: wait for all, and tell them. Where some are missing, it waits until the others know."""
    world_size = environment.world_size
    came: Sequence[int] = range(world_size)
    if not _counts_to(meeting, "count", world_size, limit):
        came = [rank for rank in came if meeting.check([f"arrived/{rank}"])]
    if len(came) == world_size:
        meeting.set("verdict", _ALL_CAME)
        return _ALL_CAME
    # Where SLURM was told to lay ranks out otherwise, those that came are not where they should be.
    places = {rank: meeting.get(f"arrived/{rank}").decode() for rank in came}
    known = bool(environment.nodes) and all(environment.nodes[rank] == places[rank] for rank in came)
    verdict = format_missing_ranks(came, world_size, limit, environment.nodes if known else ())
    meeting.set("verdict", verdict)
    _counts_to(meeting, "heard", len(came) - 1, _HEARING_TAKES / 2)
    return verdict


def _counts_to(meeting: dist.Store, key: str, number: int, seconds: float) -> bool:
    """Whether a count comes to a number within so many seconds."""
    deadline = time.monotonic() + seconds
    while meeting.add(key, 0) < number:
        if time.monotonic() > deadline:
            return False
        time.sleep(_LOOK_EVERY)
    return True


def format_missing_ranks(came: Sequence[int], world_size: int, limit: float, nodes: Sequence[str]) -> str:
    """Who did not come, of what node, and what to do about it.

    nodes: each rank's node, or nothing where that is not known.
    """
    here = set(came)
    missing = [rank for rank in range(world_size) if rank not in here]
    begin = f"{len(here)} of {world_size} ranks came within {limit / 60:g} minutes: "
    more = "or give them more time with run.rendezvous_minutes"
    if not nodes:
        return f"{begin}{format_ranks(missing)} did not come. Look at their logs, {more}"
    there = {nodes[rank] for rank in here}
    by_node: dict[str, list[int]] = {}
    for rank in missing:
        by_node.setdefault(nodes[rank], []).append(rank)
    parts = [
        f"{'of ' if node in there else ''}node {node} did not come: {format_ranks(ranks)}"
        for node, ranks in list(by_node.items())[:_NAMED]
    ]
    if len(by_node) > _NAMED:
        parts.append(f"and {len(by_node) - _NAMED} more nodes")
    absent = [node for node in by_node if node not in there]
    # Where many are missing it is not the nodes: leaving them out would not help.
    leave_out = (
        f"leave out what is broken with sbatch --exclude={','.join(absent)}, "
        if 0 < len(absent) <= _NAMED
        else ""
    )
    return f"{begin}{'; '.join(parts)}. Look at the logs of these ranks, {leave_out}{more}"
