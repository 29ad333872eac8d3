"""`bench.py model`: forward passes and training steps of this model beside the plain one."""

import argparse
import dataclasses
import os
from dataclasses import dataclass
from statistics import median
from typing import Any

from models.config import UniFormerV2Config, build_config
from pipelines.arguments import integer
from trainer.benchmark.arguments import add_common, add_device, add_timeout, positive, resolve_device
from trainer.benchmark.child import run_child
from trainer.benchmark.report import BenchmarkReport, ResultTable, interference
from trainer.errors import RunError
from trainer.monitoring.progress import show_progress

HELP = "forward and training step of the model, beside the plain implementation"
CLASSES = 400
EQUAL = {"fp32": 1e-4, "bf16": 0.05}
"""Two implementations count as the same model up to this difference of logits, as a share of the largest."""
Logits = list[list[float]]


@dataclass(frozen=True)
class Form:
    """A model and a batch that are measured."""

    name: str
    preset: str
    form: str
    frames: int
    batch: int
    frozen: bool = False

    @property
    def config(self) -> UniFormerV2Config:
        return build_config(
            self.preset,
            form=self.form,
            frames=self.frames,
            num_classes=CLASSES,
            frozen_backbone=self.frozen,
        )

    def __str__(self) -> str:
        frozen = " frozen" * self.frozen
        return f"{self.preset} {self.form}{frozen}, {self.frames} frames, batch {self.batch}"


ON_CPU = {
    "scene": Form("scene", "b16", "scene", 8, 1),
    "temporal": Form("temporal", "b16", "temporal", 16, 1),
    # Two frames: a step of the plain one with 8 takes minutes on two cores. All costs but AdamW's are
    # proportional to the frames.
    "frozen": Form("frozen", "l14_336", "scene", 2, 1, frozen=True),
    "tiny": Form("tiny", "tiny", "temporal", 4, 2),
}
ON_GPU = {
    "scene": Form("scene", "b16", "scene", 8, 32),
    "temporal": Form("temporal", "b16", "temporal", 16, 16),
    "frozen": Form("frozen", "l14_336", "scene", 8, 8, frozen=True),
    "tiny": Form("tiny", "tiny", "temporal", 4, 2),
}
DEFAULT = ("scene", "temporal", "frozen")


def add_arguments(job: argparse.ArgumentParser) -> None:
    job.add_argument(
        "--form",
        action="append",
        choices=tuple(ON_CPU),
        help=f"form to measure; repeatable ({', '.join(DEFAULT)})",
    )
    job.add_argument("--frames", type=integer(1), help="frames of a clip (8, 16; frozen on a CPU 2)")
    job.add_argument("--batch", type=integer(1), help="clips of a step, for all forms (1 on a CPU)")
    job.add_argument("--compile", action="store_true", help="measure this model compiled, too (fp32 or bf16)")
    job.add_argument(
        "--seconds",
        type=positive,
        default=4.0,
        help="repeat forward passes, then steps, for so many seconds each (%(default)g)",
    )
    job.add_argument("--repeats", type=integer(1), default=2, help="number of rounds (%(default)s)")
    cores = len(os.sched_getaffinity(0))
    job.add_argument("--threads", type=integer(1, cores), help="threads on a CPU (all cores)")
    add_device(job)
    add_timeout(job)
    add_common(job, "model")


def run(args: argparse.Namespace, report: BenchmarkReport) -> None:
    """Measures all implementations of each form in rounds, each in a process of its own.

    Raises RunError where they do not compute the same.
    """
    from trainer.benchmark.model_task import COMPILED, PLAIN, PLAIN_FROZEN, THIS

    device = resolve_device(args.device)
    threads = args.threads or len(os.sched_getaffinity(0))
    precision = "bf16" if device == "cuda" else "fp32"
    table = ON_GPU if device == "cuda" else ON_CPU
    changes: dict[str, Any] = {"frames": args.frames, "batch": args.batch}
    changes = {name: value for name, value in changes.items() if value is not None}
    forms = [dataclasses.replace(table[name], **changes) for name in args.form or DEFAULT]
    work = []
    for form in forms:
        own = [THIS, *[COMPILED] * args.compile, PLAIN, *[PLAIN_FROZEN] * form.frozen]
        work.append((form, own))
    references: dict[str, Logits] = {}
    total = args.repeats * sum(1 + len(own) for _, own in work)
    done = 0
    with show_progress("measuring the model") as progress:
        progress(0, total)
        for repeat in range(args.repeats):
            for form, own in work:
                first = repeat % len(own)
                for implementation in (None, *own[first:], *own[:first]):
                    common = {"device": device, "precision": precision, "threads": threads}
                    entry: dict[str, Any] = {"form": form.name, "about": str(form), "round": repeat, **common}
                    if implementation is None:
                        entry["limits"] = _limits(form, common, args.timeout)
                    else:
                        task = {
                            "implementation": implementation,
                            "config": dataclasses.asdict(form.config),
                            "batch": form.batch,
                            "seconds": args.seconds,
                        }
                        entry["implementation"] = implementation
                        entry |= run_child(
                            "model_task:measure_model",
                            {**task, **common},
                            threads=threads,
                            timeout=args.timeout,
                        )
                        # Not kept: a batch has thousands.
                        logits = entry.pop("logits")
                        reference = references.setdefault(form.name, logits)
                        entry["logits_difference"] = check_equal(
                            form, implementation, logits, reference, precision
                        )
                    report.measurements.append(entry)
                    report.tables = make_tables(report.measurements, {form.name: form for form in forms})
                    done += 1
                    progress(done, total)


def _limits(form: Form, common: dict[str, Any], timeout: float) -> dict[str, Any]:
    """The rate of the product of the MLP's first layer, the largest of the model."""
    config = form.config
    rows = form.batch * config.inner_frames * (1 + config.grid**2)
    shape = {"rows": rows, "inner": config.width, "columns": config.mlp_width}
    threads = common["threads"]
    return run_child("limits:measure_products", {**shape, **common}, threads=threads, timeout=timeout)


@dataclass(frozen=True)
class Summary:
    """Medians of one implementation."""

    forward: float
    """CPU seconds, or seconds on a GPU."""
    step: float
    """The same."""
    wall: float
    """Seconds of a step."""
    peak: float
    """Bytes of a step beyond its start."""

    @classmethod
    def of(cls, rounds: list[dict[str, Any]], unit: str) -> "Summary":
        return cls(
            forward=median(cost[unit] for each in rounds for cost in each["forward"]),
            step=median(cost[unit] for each in rounds for cost in each["step"]),
            wall=median(cost["seconds"] for each in rounds for cost in each["step"]),
            peak=median(each["peak_bytes"] for each in rounds),
        )


def make_tables(measurements: list[dict[str, Any]], forms: dict[str, Form]) -> list[ResultTable]:
    """The table of what was measured so far."""
    on_gpu = measurements[0]["device"] == "cuda"
    unit = "s" if on_gpu else "CPU s"
    rows: list[tuple[str, ...]] = []
    notes: list[str] = []
    for name, form in forms.items():
        own = [each for each in measurements if each["form"] == name]
        limits = [each["limits"] for each in own if "limits" in each]
        results: dict[str, list[dict[str, Any]]] = {}
        for each in own:
            if "implementation" in each:
                results.setdefault(each["implementation"], []).append(each)
        if not results:
            continue
        field = "seconds" if on_gpu else "cpu"
        found = {implementation: Summary.of(rounds, field) for implementation, rounds in results.items()}
        limit = median(each["flops_per_second" if on_gpu else "flops_per_cpu_second"] for each in limits)
        rows += _rows(form, found, limit)
        copies = median(each["bytes_per_second"] for each in limits)
        notes.append(
            f"{form}: limit {limit / 1e9:,.0f} GFLOP per {unit} (the MLP's first product), memory copy "
            f"{copies / 1e9:.0f} GB/s{_mfu(form, found) if on_gpu else ''}"
        )
    columns = (
        "form", "implementation", f"forward, {unit}", "of limit", f"step, {unit}", "of limit",
        "clips/s", "step's memory, MiB", "forward / this", "step / this", "memory / this",
    )  # fmt: skip
    notes.append(
        "Medians. 'Of limit': FLOPs of the paper's model by the rate of a matrix product. Memory: the most "
        "during a step beyond its start."
    )
    others = [each.get("limits", each)["others"] for each in measurements]
    return [ResultTable("the model", columns, tuple(rows), (*notes, *interference(others)))]


def _rows(form: Form, found: dict[str, Summary], limit: float) -> list[tuple[str, ...]]:
    """A row for each implementation, beside this model where that is measured."""
    from models.cost import multiply_accumulates
    from trainer.benchmark.model_task import THIS

    of_forward = 2 * multiply_accumulates(form.config) * form.batch / limit
    of_step = _flops(form) / limit
    this = found.get(THIS)
    rows = []
    for implementation, own in found.items():
        ratios = ["-", "-", "-"]
        if this is not None and implementation != THIS:
            pairs = ((own.forward, this.forward), (own.step, this.step), (own.peak, this.peak))
            ratios = [f"{other / mine:.2f}x" for other, mine in pairs]
        rows.append(
            (
                str(form),
                implementation,
                f"{own.forward:.3g}",
                f"{100 * of_forward / own.forward:.0f} %",
                f"{own.step:.3g}",
                f"{100 * of_step / own.step:.0f} %",
                f"{form.batch / own.wall:.3g}",
                f"{own.peak / 2**20:,.0f}",
                *ratios,
            )
        )
    return rows


def _flops(form: Form) -> float:
    """Of a training step, by the paper's equations."""
    from models.cost import train_step_flops

    return train_step_flops(form.config, recomputed_blocks=0) * form.batch


def _mfu(form: Form, found: dict[str, Summary]) -> str:
    """The MFU of each implementation; empty where the GPU's peak is unknown."""
    import torch

    from trainer.monitoring.throughput import peak_flops

    peak = peak_flops(torch.cuda.get_device_name())
    if peak is None:
        return ""
    shares = [f"{name} {100 * _flops(form) / own.wall / peak:.1f} %" for name, own in found.items()]
    return f"; MFU: {', '.join(shares)}"


def check_equal(form: Form, name: str, logits: Logits, reference: Logits, precision: str) -> float:
    """The largest difference of two implementations' logits, as a share of the largest logit.

    logits and reference: N K, of all clips and classes. Raises RunError where it is above `EQUAL`.
    """
    import torch

    own, expected = torch.tensor(logits), torch.tensor(reference)
    difference = float((own - expected).abs().max() / expected.abs().max())
    if not difference <= EQUAL[precision]:  # also for NaN
        raise RunError(
            f"{form}: the logits of '{name}' differ by {difference:.2g} of the largest from those of the "
            f"first implementation, allowed {EQUAL[precision]:g}; they are not the same model, and their "
            "times cannot be compared"
        )
    return difference
