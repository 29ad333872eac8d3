"""The steps of a verification, most valuable first."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.verification.report import Report

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Step:
    """One step, run in a process of its own."""

    name: str
    about: str
    """What it looks at."""
    seconds: int
    """After which it is ended."""
    function: str
    """`module:function` beneath this package; called with a `Task`."""
    needs_gpu: bool = False
    """Whether it has nothing to say on a CPU."""

    def run(self, task: "Task") -> None:
        module, _, function = self.function.partition(":")
        call: Callable[[Task], None] = getattr(import_module(f"{__package__}.{module}"), function)
        call(task)


@dataclass(frozen=True)
class Task:
    """What a step works with.

    folder: of its own, for files it makes; shared: of all steps, for videos that several use.
    """

    device: "torch.device"
    folder: Path
    shared: Path
    report: Report

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"


STEPS = (
    Step("machine", "GPU, driver, libraries, memory bandwidth and bf16 rate", 60, "machine:examine"),
    Step(
        "decoder", "NVDEC's frames and colours beside PyAV's", 60, "decoding:compare_frames", needs_gpu=True
    ),
    Step("tests", "the project's tests that run on a device", 240, "device_tests:run_tests"),
    Step("run", "the quickstart as a user starts it, in bf16", 120, "whole_run:quickstart"),
    Step("resume", "stop and go on bit for bit; the same bits twice", 240, "whole_run:go_on"),
    Step("model", "step time, MFU and memory of the presets beside the estimate", 200, "model_speed:measure"),
    Step("rates", "clips per second of PyAV, NVDEC and both, and GPU memory", 150, "decoding:measure_rates"),
    Step("compile", "torch.compile with and without recomputation", 150, "model_speed:measure_compiled"),
    Step(
        "kernels",
        "forms of the depthwise convolution, widths, attention, normalisation",
        60,
        "kernels:measure",
    ),
    Step(
        "memory",
        "a batch that does not fit ends with a message",
        60,
        "whole_run:out_of_memory",
        needs_gpu=True,
    ),
    Step("profile", "where the GPU's time goes in one step", 60, "model_speed:profile"),
)


def find_step(name: str) -> Step:
    """The step of that name. Raises KeyError for none."""
    return {step.name: step for step in STEPS}[name]
