"""The steps of a verification, most valuable first."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.verification.report import StepReport

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class VerificationStep:
    """One step, run in a process of its own."""

    name: str
    about: str
    """What it looks at."""
    seconds: int
    """After which it is ended."""
    function: str
    """`module:function` beneath this package; called with a `VerificationTask`."""
    needs_gpu: bool = False
    """Whether it has nothing to say on a CPU."""

    def run(self, task: "VerificationTask") -> None:
        module, _, function = self.function.partition(":")
        call: Callable[[VerificationTask], None] = getattr(import_module(f"{__package__}.{module}"), function)
        call(task)


@dataclass(frozen=True)
class VerificationTask:
    """What a step works with.

    folder: of its own, for files it makes; shared: of all steps, for videos that several use.
    """

    device: "torch.device"
    folder: Path
    shared: Path
    report: StepReport

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"


STEPS = (
    VerificationStep(
        "machine", "GPU, driver, libraries, memory bandwidth and bf16 rate", 60, "gpu:inspect_gpu"
    ),
    VerificationStep(
        "decoder", "NVDEC's frames and colours beside PyAV's", 60, "decoding:compare_frames", needs_gpu=True
    ),
    VerificationStep("tests", "the project's tests that run on a device", 240, "device_tests:run_tests"),
    VerificationStep("run", "the quickstart as a user starts it, in bf16", 120, "training_runs:quickstart"),
    VerificationStep(
        "resume", "stop and go on bit for bit; the same bits twice", 240, "training_runs:resume"
    ),
    VerificationStep(
        "model", "step time, MFU and memory of the presets beside the estimate", 200, "model_speed:measure"
    ),
    VerificationStep(
        "rates", "clips per second of PyAV, NVDEC and both, and GPU memory", 150, "decoding:measure_rates"
    ),
    VerificationStep(
        "compile", "torch.compile with and without recomputation", 150, "model_speed:measure_compiled"
    ),
    VerificationStep(
        "kernels",
        "forms of the depthwise convolution, widths, attention, normalisation",
        60,
        "kernels:measure",
    ),
    VerificationStep(
        "memory",
        "a batch that does not fit ends with a message",
        60,
        "training_runs:out_of_memory",
        needs_gpu=True,
    ),
    VerificationStep("profile", "where the GPU's time goes in one step", 60, "model_speed:profile"),
)


def step_named(name: str) -> VerificationStep:
    """The step of that name. Raises KeyError for none."""
    return {step.name: step for step in STEPS}[name]
