"""Real ranks for tests: processes of one process group on the CPU, which run functions of a test's module."""

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing import connection, forkserver
from typing import Any
from unittest import mock

PATIENCE = 240.0  # seconds; what takes longer hangs


class RankError(AssertionError):
    """What went wrong in some rank, with its traceback."""


class Ranks:
    """So many ranks, each a process that has joined the process group. To be used as a context.

    The ranks stay between calls, so that what takes seconds happens once. A rank that fails or dies ends all.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.processes: list[Any] = []
        self._pipes: list[connection.Connection] = []

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call a module's function in every rank; returns what each returned, by rank.

        Raises RankError, after ending all ranks, when one raised, died or came to no end.
        """
        self.start(function, *arguments)
        return self.results()

    def start(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Begin what `results` ends."""
        if not self.processes:
            self._begin()
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((function, arguments)))

    def results(self) -> list[Any]:
        """As `run` returns and raises them."""
        found: dict[int, Any] = {}
        deadline = time.monotonic() + PATIENCE
        while len(found) < self.world_size:
            waiting = [rank for rank in range(self.world_size) if rank not in found]
            ready = connection.wait([self._pipes[rank] for rank in waiting], deadline - time.monotonic())
            if not ready:
                self.end()
                raise RankError(f"ranks {waiting} came to no end within {PATIENCE:.0f} s")
            for rank in waiting:
                if self._pipes[rank] in ready:
                    try:
                        went_well, found[rank] = pickle.loads(self._pipes[rank].recv_bytes())
                    except EOFError:
                        went_well, found[rank] = False, "it died"
                    if not went_well:
                        self.end()  # the others may wait for it in a collective
                        raise RankError(f"rank {rank} of {self.world_size}: {found[rank]}")
        return [found[rank] for rank in range(self.world_size)]

    def end(self) -> None:
        """Kill all ranks and wait until they are gone; the next call begins with new ones."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.processes, self._pipes = [], []

    def _begin(self) -> None:
        context = prepared_context()
        port = free_port()
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world_size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self._pipes.append(ours)


def prepared_context() -> Any:
    """Makes processes that are copies of one which has imported what takes seconds, DeepSpeed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["deepspeed.runtime.zero.stage3", "functorch.compile", "safetensors.torch"]
    )
    with mock.patch.dict(os.environ, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1"):
        forkserver.ensure_running()
    return context


def _serve(rank: int, world_size: int, port: int, pipe: connection.Connection) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    import torch

    from trainer.engine.engine import connect
    from trainer.environment import find_environment

    torch.set_num_threads(1)
    connect(find_environment("cpu"))
    while True:
        try:
            function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:  # the test's process is gone
            return
        try:
            answer = True, function(*arguments)
        except Exception:
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
