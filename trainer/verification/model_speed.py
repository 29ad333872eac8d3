"""Measures training steps of the presets: time, MFU, and memory compared with the estimate."""

import gc
import time
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from models import UniFormerV2
from models.config import build_config
from models.cost import train_step_flops
from trainer.config.load import load_recipe
from trainer.config.schema import Recipe
from trainer.distributed.environment import find_environment
from trainer.engine.batch_plan import BatchPlan
from trainer.engine.deepspeed_engine import Engine
from trainer.engine.memory_estimate import GIB, MemoryModel
from trainer.engine.process_group import connect
from trainer.monitoring.throughput import peak_flops
from trainer.verification.steps import VerificationTask

RECIPE = Path(__file__).parents[2] / "recipes/quickstart.yaml"
CLASSES = 400
WARM, TIMED = 3, 6
ESTIMATE = (0.95, 1.3)
"""Bounds of the estimate of allocated bytes, as multiples of the measured bytes."""


@dataclass(frozen=True)
class Case:
    """A training step to be measured."""

    preset: str
    frames: int
    batch: int
    recomputed: int = 0
    form: str = "scene"
    zero_stage: int = 1
    compile: bool = False
    fp8: bool = False

    @property
    def name(self) -> str:
        parts = [f"{self.preset} {self.form}, {self.frames} frames, batch {self.batch}"]
        parts += [f"{self.recomputed} blocks recomputed"] * (self.recomputed > 0)
        parts += [f"ZeRO {self.zero_stage}"] * (self.zero_stage != 1) + ["compiled"] * self.compile
        parts += ["FP8"] * self.fp8
        return ", ".join(parts)


ON_GPU = (
    Case("l14_336", 64, 1),
    Case("l14_336", 64, 1, recomputed=24),
    Case("l14_336", 64, 2),
    Case("l14_336", 16, 4),
    Case("l14_336", 16, 4, recomputed=24),
    Case("l14_336", 16, 4, recomputed=12),  # the other 12 compute the inputs of their linear layers again
    Case("l14", 8, 16),
    Case("l14", 16, 8),
    Case("l14", 16, 16, recomputed=24),
    Case("b16", 8, 32),
    Case("b16", 16, 16),
    Case("b16", 8, 32, zero_stage=3),
    Case("b16", 16, 16, form="temporal"),
    Case("l14", 8, 8, form="temporal"),
)
ON_CPU = (Case("tiny", 4, 2), Case("tiny", 4, 2, recomputed=4), Case("tiny", 4, 2, form="temporal"))
COMPILED_ON_GPU = (
    Case("b16", 8, 32),
    Case("b16", 8, 32, compile=True),
    Case("b16", 8, 32, recomputed=12),
    Case("b16", 8, 32, recomputed=12, compile=True),
)
FP8_ON_GPU, FP8_ON_CPU = Case("b16", 8, 32, compile=True), Case("tiny", 4, 2)
FP8_STEPS = 20
MOST_BESIDE_FP8 = 0.05
"""Of the first loss, between the losses with and without FP8. Assumed, not measured on a GPU."""
COMPARED = {"cuda": Case("b16", 8, 4), "cpu": Case("tiny", 4, 2)}
MOST_DIFFERENT = {"cuda": 0.05, "cpu": 1e-5}
"""Between the gradients with and without recomputation, relative; in bf16 on a GPU, so with its rounding."""
PROFILED = Case("l14_336", 16, 4)


def measure(task: VerificationTask) -> None:
    """Measures step time, MFU and memory of each case; compares gradients with and without recomputation."""
    for case in ON_GPU if task.gpu else ON_CPU:
        attempt(task, case)
    compare_gradients(task, COMPARED[task.device.type])


def compare_gradients(task: VerificationTask, case: Case) -> None:
    """Compares the gradients of a model with those of the same model that recomputes its first block, so that
    all others compute the inputs of their linear layers again."""
    plain = gradients_of(task, case, recomputed=0)
    largest = max(float(gradient.norm()) for gradient in plain.values())
    again = gradients_of(task, case, recomputed=1)
    differences = {
        name: float((again[name] - gradient).norm()) / max(float(gradient.norm()), 1e-6 * largest)
        for name, gradient in plain.items()
    }
    worst = max(differences, key=lambda name: differences[name])
    most = MOST_DIFFERENT[task.device.type]
    task.report.check(
        f"{case.name}: gradients with and without a recomputed block",
        all(difference <= most for difference in differences.values()),
        f"differ by at most {differences[worst]:.2g} ({worst})",
        f"at most {most:g} of each gradient's norm",
    )


def gradients_of(task: VerificationTask, case: Case, *, recomputed: int) -> dict[str, torch.Tensor]:
    """The gradients, in fp32, of a model and clips that depend on the case only."""
    config = build_config(
        case.preset, form=case.form, frames=case.frames, num_classes=CLASSES, recomputed_blocks=recomputed
    )
    torch.manual_seed(0)
    with task.device:
        model = UniFormerV2(config).to(torch.bfloat16 if task.gpu else torch.float32)
        for parameter in model.parameters():
            if not parameter.any():  # behind such a one, the others of its branch have no gradient
                torch.nn.init.normal_(parameter, std=0.02)
        clips = torch.randn(case.batch, 3, case.frames, config.resolution, config.resolution)
    keys = torch.arange(case.batch, device=task.device)
    logits = model(clips.to(next(model.parameters()).dtype), keys)
    torch.nn.functional.cross_entropy(logits.float(), keys).backward()
    return {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}


def measure_compiled(task: VerificationTask) -> None:
    """Measures the same, eager and compiled, with and without recomputation."""
    for case in COMPILED_ON_GPU if task.gpu else ON_CPU[:1]:
        attempt(task, case)


def compare_fp8(task: VerificationTask) -> None:
    """Measures steps with products in FP8 and without, and compares their losses on one batch."""
    plain = FP8_ON_GPU if task.gpu else FP8_ON_CPU
    losses = attempt(task, plain, steps=FP8_STEPS)
    rounded = attempt(task, replace(plain, fp8=True), steps=FP8_STEPS)
    if not losses or not rounded:
        return
    differences = [abs(one - other) / losses[0] for one, other in zip(losses, rounded, strict=True)]
    task.report.check(
        f"{plain.name}: losses of {FP8_STEPS} steps with FP8 and without",
        max(differences) <= MOST_BESIDE_FP8,
        f"{losses[0]:.4f} to {losses[-1]:.4f} without, {rounded[0]:.4f} to {rounded[-1]:.4f} with, at most "
        f"{100 * max(differences):.2g} % of the first apart",
        f"at most {MOST_BESIDE_FP8:.0%}",
    )


def attempt(task: VerificationTask, case: Case, steps: int = WARM + TIMED) -> list[float]:
    """Measure one case, and return its losses; an exception is reported as a failed check."""
    losses: list[float] = []
    try:
        losses = measure_case(task, case, steps)
    except Exception as error:
        traceback.print_exc()
        text = " ".join(str(error).split())[:300]
        task.report.check(case.name, False, f"{type(error).__name__}: {text}", "trains")
    gc.collect()
    if task.gpu:
        torch.cuda.empty_cache()
    return losses


def measure_case(task: VerificationTask, case: Case, steps: int) -> list[float]:
    """Measures time and memory of one case's steps. Returns the losses of so many, most of them timed."""
    before = torch.cuda.memory_allocated(task.device) if task.gpu else 0  # left by earlier cases
    trained = TrainingCase(task, case)
    began = time.perf_counter()
    for _ in range(WARM):
        trained.step()
    losses = trained.losses()
    warming = time.perf_counter() - began
    if task.gpu:
        torch.cuda.reset_peak_memory_stats(task.device)
    began = time.perf_counter()
    for _ in range(TIMED):
        trained.step()
    losses += trained.losses()  # waits for the last step
    seconds = (time.perf_counter() - began) / TIMED
    flops = train_step_flops(trained.config, recomputed_blocks=0) * case.batch / seconds
    text = f"{1000 * seconds:.0f} ms a step, {case.batch / seconds:.2f} clips/s, {flops / 1e12:.1f} TFLOP/s"
    peak = peak_flops(torch.cuda.get_device_name(task.device)) if task.gpu else None
    if peak:
        text += f", MFU {100 * flops / peak:.1f} %"
    if case.compile:
        text += f", compiled in {warming:.0f} s"
    peak_bytes = torch.cuda.max_memory_allocated(task.device) if task.gpu else 0
    for _ in range(steps - WARM - TIMED):
        trained.step()
    losses += trained.losses() if steps > WARM + TIMED else []
    finite = all(loss == loss and abs(loss) < 100 for loss in losses)
    task.report.check(case.name, finite, text, "trains; losses are finite")
    if task.gpu:
        held = peak_bytes - before
        reserved = torch.cuda.max_memory_reserved(task.device)
        expected = trained.expected_bytes()
        ratio = expected / held
        task.report.check(
            f"{case.name}: memory",
            case.compile or case.fp8 or ESTIMATE[0] <= ratio <= ESTIMATE[1],
            f"{held / GIB:.2f} GiB allocated ({before / GIB:.2f} before), {reserved / GIB:.2f} reserved, "
            f"{expected / GIB:.2f} expected ({ratio:.2f})",
            f"expected {ESTIMATE[0]} to {ESTIMATE[1]} times what was allocated",
        )
    return losses


class TrainingCase:
    """An engine as in a run, and one batch of random clips to train on."""

    def __init__(self, task: VerificationTask, case: Case) -> None:
        kind = task.device.type
        precision = "bf16" if task.gpu else "fp32"
        self.recipe: Recipe = load_recipe(
            RECIPE,
            [
                f"optimisation.global_batch={case.batch}",
                f"engine.device={kind}",
                f"engine.precision={precision}",
                f"engine.compile={str(case.compile).lower()}",
                f"engine.fp8={str(case.fp8).lower()}",
                "evaluation.batch=1",
                "data.prefetch=2",
            ],
        )
        model: dict[str, Any] = {
            "frames": case.frames,
            "num_classes": CLASSES,
            "recomputed_blocks": case.recomputed,
        }
        self.config = build_config(case.preset, form=case.form, **model)
        environment = find_environment(kind)  # type: ignore[arg-type]
        connect(environment)
        torch.manual_seed(0)
        # Weights are drawn on the device: on a CPU, those of L/14 take seconds.
        with task.device:
            network = UniFormerV2(self.config)
        stage = case.zero_stage if task.gpu else 0
        self.engine = Engine(
            network, self.recipe, environment, BatchPlan(stage, case.batch, 1, case.recomputed)
        )
        self.engine.train()
        side = self.config.resolution
        self._clips = torch.randn(case.batch, 3, case.frames, side, side, device=task.device)
        self._labels = torch.arange(case.batch, device=task.device) % CLASSES
        self._keys = torch.arange(case.batch, device=task.device)
        self._losses: list[torch.Tensor] = []
        memory = MemoryModel.of(self.recipe, self.config, ranks=1, precision=precision, kind=kind)  # type: ignore[arg-type]
        self._demand = memory.estimate(
            zero_stage=stage, micro_batch=case.batch, recomputed_blocks=case.recomputed
        )

    def step(self) -> None:
        logits = self.engine.forward(self._clips, self._keys)
        loss = torch.nn.functional.cross_entropy(logits, self._labels)
        self.engine.backward(loss)
        self.engine.step(1e-5)
        self._losses.append(loss.detach())

    def losses(self) -> list[float]:
        """The losses of the steps since the last call; waits for them."""
        values = torch.stack(self._losses).tolist()
        self._losses.clear()
        return values

    def expected_bytes(self) -> int:
        """The estimate of allocated bytes: without DALI's batches and the reserve, with one batch."""
        clips = self._clips.numel() * self._clips.element_size()
        return self._demand.states + self._demand.working + clips


def profile(task: VerificationTask) -> None:
    """Reports the operations that take most of the GPU's time in one step."""
    trained = TrainingCase(task, PROFILED if task.gpu else ON_CPU[0])
    for _ in range(WARM):
        trained.step()
    trained.losses()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if task.gpu:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profiler:
        trained.step()
        trained.losses()
    profiler.export_chrome_trace(str(task.folder / "trace.json"))
    # Kernels alone: operations contain their kernels, and kernels have no host time.
    events = profiler.key_averages()
    kernels = [event for event in events if not task.gpu or str(event.device_type).endswith("CUDA")]
    own = "self_device_time_total" if task.gpu else "self_cpu_time_total"
    kernels.sort(key=lambda event: getattr(event, own), reverse=True)
    whole = sum(getattr(event, own) for event in kernels)
    task.report.measure("all kernels of a step", f"{whole / 1000:.1f} ms")
    for event in kernels[:25]:
        spent = getattr(event, own)
        task.report.measure(
            f"{event.key[:100]}", f"{100 * spent / whole:.1f} %, {spent / 1000:.2f} ms, {event.count} times"
        )
