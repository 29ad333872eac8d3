"""Hardware metrics of every node: CPU, memory, network and GPUs, sampled by one thread per node.

The first rank of a node samples. The other nodes write their latest sample to the run directory; rank 0
records it together with its own. This needs no collective and no call to MLflow's server.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

from trainer.system.files import write_text

SECONDS = 15.0  # between two samples of a node
VALUES_PER_SECOND = 2.0
"""Upper limit for MLflow over all nodes: from 4 nodes on, samples are further apart."""

FOLDER = "nodes"

_log = logging.getLogger(__name__)


@dataclass
class NodeMonitor:
    """Samples this node while it is open. A failure is logged once; sampling and training continue."""

    run_dir: Path
    """The run's folder, shared by all nodes."""
    node: int
    """Index of this node in the run, from 0."""
    nodes: int
    """Number of nodes."""
    gpus: Sequence[str]
    """UUIDs of this node's GPUs that the run uses, as NVML writes them."""
    report: Callable[[Mapping[str, float]], None] | None
    """On node 0, records the samples of all nodes; None on the others."""

    def __post_init__(self) -> None:
        self._folder = self.run_dir / FOLDER
        self._reported: dict[int, float] = {}  # time of the latest sample of each other node
        self._began = time.time()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="node monitor", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._thread.join(SECONDS)

    def _work(self) -> None:
        sampler: Sampler | None = None
        pause, logged = SECONDS, False
        while not self._closing.wait(pause):
            try:
                if sampler is None:
                    sampler = Sampler(self.gpus)
                    continue  # utilisation and rates refer to the time since the first sample
                values = sampler.sample()
                pause = max(SECONDS, self.nodes * len(values) / VALUES_PER_SECOND)
                if self.report is None:
                    self._write_sample(values)
                else:
                    self.report(self._of_all(values))
            except Exception as error:  # no error of the monitor may stop the training
                if not logged:
                    _log.warning("hardware metrics of node %d cannot be read: %s", self.node, error)
                logged = True

    def _write_sample(self, values: Mapping[str, float]) -> None:
        """Write this node's sample to the run directory, for rank 0."""
        self._folder.mkdir(exist_ok=True)
        text = json.dumps({"time": time.time(), "values": values})
        write_text(self._folder / f"node-{self.node:05d}.json", text, sync=False, shared=True)

    def _of_all(self, own: Mapping[str, float]) -> dict[str, float]:
        if self.nodes == 1:
            return dict(own)
        found = {0: own}
        for node in range(1, self.nodes):
            with suppress(
                OSError, ValueError, KeyError, TypeError
            ):  # not written yet, or not by this program
                record = json.loads((self._folder / f"node-{node:05d}.json").read_text(encoding="utf-8"))
                if record["time"] > self._reported.get(node, self._began):
                    self._reported[node] = record["time"]
                    found[node] = {str(key): float(value) for key, value in record["values"].items()}
        return {f"{key}_node{node}": value for node, values in found.items() for key, value in values.items()}


class Sampler:
    """Reads one node's counters; a sample takes a few milliseconds."""

    def __init__(self, gpus: Sequence[str]) -> None:
        self._handles = _open_gpus(gpus)
        psutil.cpu_percent()  # the next call gives the share since this one
        self._network = _network()

    def sample(self) -> dict[str, float]:
        """Values of this moment, or since the last call, with the names of MLflow's own monitor.

        GPUs: mean and lowest utilisation, highest memory usage, total power. Network: without the loopback
        and without RDMA, which these counters lack.
        """
        before, self._network = self._network, _network()
        seconds = max(self._network[0] - before[0], 1e-3)
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_percentage": psutil.virtual_memory().percent,
            "network_receive_megabytes_per_second": (self._network[1] - before[1]) / 1e6 / seconds,
            "network_transmit_megabytes_per_second": (self._network[2] - before[2]) / 1e6 / seconds,
            **_read_gpus(self._handles),
        }
        return {f"system/{name}": round(value, 3) for name, value in values.items()}


def _network() -> tuple[float, int, int]:
    """Time in seconds, bytes received, bytes sent."""
    counters = [counter for name, counter in psutil.net_io_counters(pernic=True).items() if name != "lo"]
    received = sum(counter.bytes_recv for counter in counters)
    return time.monotonic(), received, sum(counter.bytes_sent for counter in counters)


def _open_gpus(uuids: Sequence[str]) -> list[object]:
    """NVML's handles; none if NVML does not know a GPU, such as a MIG partition."""
    if not uuids:
        return []
    import pynvml

    try:
        pynvml.nvmlInit()
        return [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
    except pynvml.NVMLError as error:
        _log.warning("NVML cannot read the GPUs: %s", error)
        return []


def _read_gpus(handles: Sequence[object]) -> dict[str, float]:
    if not handles:
        return {}
    import pynvml

    used = [float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu) for handle in handles]
    memory = [pynvml.nvmlDeviceGetMemoryInfo(handle) for handle in handles]
    return {
        "gpu_utilization_percentage": sum(used) / len(used),
        "gpu_utilization_percentage_lowest": min(used),
        "gpu_memory_usage_percentage": max(100 * part.used / part.total for part in memory),
        "gpu_power_usage_watts": sum(pynvml.nvmlDeviceGetPowerUsage(handle) for handle in handles) / 1000,
    }
