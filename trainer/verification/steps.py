"""The steps of a verification, the most important first."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.verification.report import StepReport

if TYPE_CHECKING:
    import torch


ROOT = Path(__file__).parents[2]
"""The clone, or the package's folder in a wheel."""


@dataclass(frozen=True)
class VerificationStep:
    """One step, which runs in its own process."""

    name: str
    about: str
    """What it verifies or measures."""
    seconds: int
    """Budget on a GPU. A step may also use some of what the steps before it left."""
    function: str
    """`module:function` in this package; called with a `VerificationTask`."""
    needs_gpu: bool = False
    """Whether it is skipped on a CPU."""

    def run(self, task: "VerificationTask") -> None:
        module, _, function = self.function.partition(":")
        call: Callable[[VerificationTask], None] = getattr(import_module(f"{__package__}.{module}"), function)
        call(task)


@dataclass(frozen=True)
class VerificationTask:
    """The inputs of a step."""

    device: "torch.device"
    folder: Path
    """For files of this step."""
    shared: Path
    """For videos that several steps use."""
    report: StepReport

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"


STEPS = (
    VerificationStep(
        "machine", "GPU, driver, libraries, preflight, memory bandwidth and bf16 rate", 30, "gpu:inspect_gpu"
    ),
    VerificationStep(
        "decoder", "NVDEC's frames and colours compared with PyAV's", 20, "decoding:compare_frames"
    ),
    VerificationStep("tests", "the project's tests that run on a device", 95, "device_tests:run_tests"),
    VerificationStep("run", "the quickstart as a user starts it, in bf16", 40, "training_runs:quickstart"),
    VerificationStep(
        "resume", "stopped and resumed bit for bit; the same bits twice", 50, "training_runs:resume"
    ),
    VerificationStep(
        "model", "step time, MFU, and memory compared with the estimate", 55, "model_speed:measure"
    ),
    VerificationStep(
        "rates", "clips per second of PyAV, NVDEC and both, and GPU memory", 55, "decoding:measure_rates"
    ),
    VerificationStep(
        "compile", "torch.compile with and without recomputation", 50, "model_speed:measure_compiled"
    ),
    VerificationStep(
        "fp8", "engine.fp8: step time, MFU and losses beside bf16, compiled", 50, "model_speed:compare_fp8"
    ),
    VerificationStep(
        "kernels",
        "forms of the depthwise convolution, widths, attention, normalisation",
        10,
        "kernels:measure",
    ),
    VerificationStep(
        "memory",
        "a batch that is too large ends with a message",
        15,
        "training_runs:out_of_memory",
        needs_gpu=True,
    ),
    VerificationStep("profile", "which kernels take the GPU's time in a step", 10, "model_speed:profile"),
)
"""Their budgets add up to 480 s, the default of `--seconds`."""


def step_named(name: str) -> VerificationStep:
    """The step with this name. Raises KeyError."""
    return {step.name: step for step in STEPS}[name]
