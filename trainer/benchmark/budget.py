"""`bench.py budget`: what a training step costs a GPU, on paper, from the shapes of the model.

Each kernel takes as long as its FLOPs at the rate of large matrix products, or its bytes at the rate of the
memory, whichever is longer. Communication between ranks is not counted.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.arguments import integer
from pipelines.formatting import format_count
from trainer.benchmark.arguments import add_common, add_recipe, positive
from trainer.benchmark.report import BenchmarkReport, ResultTable
from trainer.errors import RunError
from trainer.monitoring.progress import show_progress

if TYPE_CHECKING:
    from trainer.engine.memory_estimate import AvailableMemory
    from trainer.engine.step_kernels import Device, StepKernels

HELP = "what a training step costs a GPU, per kind of kernel, on paper"
GIB = 2**30
GOAL = 0.55
"""MFU."""
SHOWN_PLANS = 6


def add_arguments(job: argparse.ArgumentParser) -> None:
    add_recipe(job, "k400_l14_336_64f", "count")
    job.add_argument(
        "--classes", type=integer(1), default=400, help="classes, where the recipe names none (%(default)s)"
    )
    job.add_argument(
        "--micro-batch", type=integer(1), help="clips of a forward pass (what `train` would choose)"
    )
    job.add_argument(
        "--recomputed-blocks", type=integer(0), metavar="N", help="blocks of the backbone (the same)"
    )
    job.add_argument(
        "--ranks", type=integer(1), default=8, help="ranks that share the optimiser state (%(default)s)"
    )
    job.add_argument("--memory", type=positive, default=80.0, help="memory of a GPU in GiB (%(default)g)")
    # Rates as measured on an H100 80GB HBM3: docs/performance.md, "2026-11-26: the first GPU".
    job.add_argument("--tflops", type=positive, default=782.0, help="rate of matrix products (%(default)g)")
    job.add_argument(
        "--bandwidth", type=positive, default=2.98, help="rate of the memory in TB/s (%(default)g)"
    )
    job.add_argument(
        "--peak", type=positive, default=989.0, help="TFLOP/s of the data sheet, for the MFU (%(default)g)"
    )
    add_common(job, "budget")


def run(args: argparse.Namespace, report: BenchmarkReport) -> None:
    """Counts the kernels.

    Raises RecipeError or ModelError for a recipe that is wrong, and RunError if no plan fits into the memory.
    """
    with show_progress("counting kernels") as progress:
        progress(0, 4)  # before imports that take seconds
        from trainer.config.load import load_recipe
        from trainer.config.recipe_names import find_recipe
        from trainer.engine.batch_plan import choose_batch_plan
        from trainer.engine.memory_estimate import AvailableMemory
        from trainer.engine.step_kernels import FP8_FACTOR, Device
        from trainer.setup.preparation import model_config

        recipe = load_recipe(find_recipe(args.recipe), args.set)
        config = model_config(recipe, args.classes)
        available = AvailableMemory("cuda", int(GIB * args.memory))
        chosen = choose_batch_plan(recipe, config, args.ranks, precision="bf16", available=available)
        progress(1, 4)
        batch = args.micro_batch or chosen.micro_batch
        recomputed = chosen.recomputed_blocks if args.recomputed_blocks is None else args.recomputed_blocks
        dataclasses.replace(config, recomputed_blocks=recomputed)  # raises ModelError for too many
        flops = 1e12 * args.tflops
        device = Device(flops, 1e12 * args.bandwidth, 1e12 * args.peak, fp8=flops * FP8_FACTOR)
        budget = Budget(recipe, config, device, args.ranks)
        report.tables.append(budget.table_of_kinds(budget.step(batch, recomputed), recomputed))
        progress(2, 4)
        changes = budget.changes(batch, recomputed)
        report.tables.append(table_of_changes(changes, args.memory))
        progress(3, 4)
        plans = budget.plans(available)
        progress(4, 4)
    report.measurements = [dataclasses.asdict(each) for each in (*changes, *plans)]
    if not plans:
        depth = 0 if config.frozen_backbone else config.depth
        need = budget.memory(1, depth, compiled=recipe.engine.compile)
        again = format_count(depth, "block")
        raise RunError(
            f"no plan fits into --memory {args.memory:g} GiB: micro-batch 1 with {again} recomputed "
            f"needs {need / GIB:.1f} GiB by the estimate of `--check`. More --ranks divide the "
            "optimiser state; fewer model.frames need less"
        )
    report.tables.append(budget.table_of_plans(plans, args.memory))


@dataclass(frozen=True)
class Plan:
    """A way to compute a step."""

    about: str
    micro_batch: int
    recomputed: int
    seconds: float
    """Of a micro-batch, with its share of the update."""
    mfu: float
    memory: int | None
    """Estimated bytes; None where there is no estimate."""


class Budget:
    """The costs of a recipe's training step on one device."""

    def __init__(self, recipe: Any, config: Any, device: "Device", ranks: int) -> None:
        from trainer.engine.memory_estimate import MemoryModel

        self.recipe, self.config, self.device, self.ranks = recipe, config, device, ranks
        self._memory = MemoryModel.of(recipe, config, ranks=ranks, precision="bf16", kind="cuda")
        self._steps: dict[tuple[int, int, bool, bool], StepKernels] = {}

    def step(
        self, batch: int, recomputed: int, *, compiled: bool = False, fp8: bool | None = None
    ) -> "StepKernels":
        """fp8: None is as the recipe has it."""
        from trainer.engine.step_kernels import record_step

        fp8 = self.recipe.engine.fp8 if fp8 is None else fp8
        key = batch, recomputed, compiled, fp8
        if key not in self._steps:
            config = dataclasses.replace(self.config, recomputed_blocks=recomputed)
            self._steps[key] = record_step(config, batch, compiled=compiled, ranks=self.ranks, fp8=fp8)
        return self._steps[key]

    @property
    def fits_fp8(self) -> bool:
        from models.fp8 import MULTIPLE

        return self.config.width % MULTIPLE == 0 == self.config.mlp_width % MULTIPLE

    def accumulation(self, batch: int) -> int:
        return max(1, self.recipe.optimisation.global_batch // (self.ranks * batch))

    def mfu(self, seconds: float, batch: int) -> float:
        """Of the paper's model, without what is computed twice."""
        from models.cost import train_step_flops

        return train_step_flops(self.config, recomputed_blocks=0) * batch / seconds / self.device.peak

    def memory(self, batch: int, recomputed: int, *, compiled: bool) -> int:
        memory = dataclasses.replace(self._memory, compiled=compiled)
        return memory.estimate(zero_stage=1, micro_batch=batch, recomputed_blocks=recomputed).total

    def plan(
        self,
        about: str,
        step: "StepKernels",
        recomputed: int,
        *,
        compiled: bool = False,
        has_estimate: bool = True,
    ) -> Plan:
        batch = step.batch
        seconds = step.seconds(self.device, self.accumulation(batch))
        memory = self.memory(batch, recomputed, compiled=compiled) if has_estimate else None
        return Plan(about, batch, recomputed, seconds, self.mfu(seconds, batch), memory)

    def changes(self, batch: int, recomputed: int) -> list[Plan]:
        """What single changes would make of the step, and all of them together."""
        from trainer.engine.step_kernels import StepKernels

        def uncompiled_and_compiled(about: str, blocks: int) -> list[Plan]:
            compiled = self.step(batch, blocks, compiled=True)
            return [
                self.plan(f"{about}, uncompiled", self.step(batch, blocks), blocks),
                self.plan(f"{about}, compiled", compiled, blocks, compiled=True),
            ]

        found = []
        if recomputed:
            found += uncompiled_and_compiled(f"{format_count(recomputed, 'block')} recomputed", recomputed)
        found += uncompiled_and_compiled("nothing recomputed", 0)
        none, depth = self.step(batch, 0), self.config.depth
        if not self.config.frozen_backbone:
            every = self.step(batch, depth)
            cheap, name = _cheap_again(every, none), "all recomputed but products and attention"
            found += [
                self.plan(f"{name}, uncompiled", cheap, depth, has_estimate=False),
                self.plan(f"{name}, compiled", cheap.fused(), depth, has_estimate=False),
            ]
            if recomputed < depth:
                found += uncompiled_and_compiled("all blocks recomputed", depth)
        if not self.recipe.engine.fp8 and self.fits_fp8:
            step = self.step(batch, 0, compiled=True, fp8=True)
            found.append(self.plan("nothing recomputed, products in FP8, compiled", step, 0, compiled=True))
        products = [kernel for kernel in none.kernels if kernel.flops]
        bound = StepKernels(batch, products, none.update)
        name = f"bound in {'FP8' if self.recipe.engine.fp8 else 'bf16'}: products, attention and update alone"
        found.append(self.plan(name, bound, 0, has_estimate=False))
        return found

    def plans(self, available: "AvailableMemory") -> list[Plan]:
        """Every plan of the recipe's stage that fits, the fastest first; compiled if the recipe is."""
        from trainer.engine.batch_plan import order_of_plans, possible_plans
        from trainer.engine.step_cost import StepCost

        possible = possible_plans(self.recipe, self.config, self.ranks, precision="bf16", available=available)
        stage = self.recipe.engine.zero_stage
        stages = possible.stages if stage == "auto" else [max(stage, possible.stages[0])]
        share, fp8 = self.recipe.optimisation.global_batch // self.ranks, self.recipe.engine.fp8
        cost = StepCost(self._memory, share, fp8, self.device)
        blocks = [0] if self.config.frozen_backbone else possible.blocks
        timed = {
            plan: cost.seconds_per_clip(*plan)
            for plan in itertools.product(stages, possible.sizes, blocks)
            if possible.fits(*plan)
        }
        found = []
        for stage, size, recomputed in sorted(timed, key=lambda plan: order_of_plans(timed[plan], plan)):
            name = f"micro-batch {size}, {format_count(recomputed, 'block')} recomputed, ZeRO {stage}"
            seconds = size * timed[stage, size, recomputed]
            need = possible.estimate(stage, size, recomputed).total
            found.append(Plan(name, size, recomputed, seconds, self.mfu(seconds, size), need))
        return found

    def table_of_kinds(self, step: "StepKernels", recomputed: int) -> ResultTable:
        from trainer.engine.step_kernels import totals_by_kind

        plain = totals_by_kind([*step.kernels, *step.update], self.device.seconds)
        compiled_step = self.step(step.batch, recomputed, compiled=True)
        fused = totals_by_kind([*compiled_step.kernels, *step.update], self.device.seconds)
        rows = []
        for kind in [*plain, *(kind for kind in fused if kind not in plain)]:
            own, compiled = plain.get(kind), fused.get(kind)
            rows.append(
                (
                    kind,
                    "FLOPs" if _is_bound_by_flops(own or compiled, self.device) else "bytes",
                    *_cells(own),
                    *_cells(compiled),
                )
            )
        columns = ("kind", "bound", *_names("uncompiled"), *_names("compiled"))
        whole = (_sum(plain.values()), _sum(fused.values()))
        rows.append(("all", "", *_cells(whole[0]), *_cells(whole[1])))
        title = (
            f"{self.recipe.name}: {self.config.frames} frames of {self.config.resolution} px, micro-batch "
            f"{step.batch}, {recomputed} of {self.config.depth} blocks recomputed, bf16"
        )
        device = self.device
        note = (
            f"Products at {device.flops / 1e12:.0f} TFLOP/s, memory at {device.bandwidth / 1e12:g} TB/s, at "
            f"least {1e6 * device.least:g} µs a kernel (assumed). The host starts one in "
            f"{1e6 * device.launch:g} µs (assumed); the tables below count that where it takes longer than "
            f"the kernels. The update is that of one of {self.ranks} ranks. Not a measurement."
        )
        return ResultTable(title, columns, tuple(rows), (note,))

    def table_of_plans(self, plans: list[Plan], memory: float) -> ResultTable:
        shown = plans[:SHOWN_PLANS]
        rows = tuple((plan.about, _over(plan.mfu), *_plan_cells(plan)) for plan in shown)
        note = f"The fastest within {memory:g} GiB by the estimate of `--check`: {plans[0].about}."
        compiled = "compiled" if self.recipe.engine.compile else "not compiled"
        title = (
            f"The fastest of {format_count(len(plans), 'plan')} that fit into {memory:g} GiB, "
            f"{format_count(self.ranks, 'rank')}, {compiled}"
        )
        return ResultTable(title, ("plan", *_plan_names()), rows, (note,))


def table_of_changes(changes: list[Plan], memory: float) -> ResultTable:
    rows = tuple((plan.about, _over(plan.mfu), *_plan_cells(plan)) for plan in changes)
    reached = [plan for plan in changes if plan.mfu >= GOAL and not plan.about.startswith("bound")]
    fit = [plan.about for plan in reached if plan.memory is not None and plan.memory <= GIB * memory]
    large = [plan.about for plan in reached if plan.memory is not None and plan.memory > GIB * memory]
    unknown = [plan.about for plan in reached if plan.memory is None]
    notes = [
        f"An MFU of {GOAL:.0%} within {memory:g} GiB is reached with: {'; '.join(fit)}."
        if fit
        else f"No change with an estimate within {memory:g} GiB brings the MFU to {GOAL:.0%}."
    ]
    notes += [f"Reached, but not within {memory:g} GiB: {'; '.join(large)}."] * bool(large)
    notes += [f"Reached, without an estimate of the memory: {'; '.join(unknown)}."] * bool(unknown)
    columns = ("change", *_plan_names())
    return ResultTable("What changes would make of it", columns, rows, tuple(notes))


def _cheap_again(all_again: "StepKernels", none: "StepKernels") -> "StepKernels":
    """A step that recomputes only what is neither a product nor attention."""
    from trainer.engine.step_kernels import StepKernels

    # In a step with recomputation, the kernels beyond those without are the ones that run twice.
    left: dict[tuple[str, int], int] = {}
    for kernel in none.kernels:
        key = kernel.kind, kernel.flops
        left[key] = left.get(key, 0) + 1
    kept = []
    for kernel in all_again.kernels:
        key = kernel.kind, kernel.flops
        if kernel.flops and not left.get(key):
            continue
        left[key] = left.get(key, 0) - 1
        kept.append(kernel)
    return StepKernels(none.batch, kept, none.update)


def _is_bound_by_flops(total: Any, device: "Device") -> bool:
    _, flops, moved, _ = total
    return flops / device.flops > moved / device.bandwidth


def _sum(totals: Iterable[tuple[int, float, float, float]]) -> tuple[int, float, float, float]:
    count, flops, moved, seconds = (sum(column) for column in zip(*totals, strict=True))
    return int(count), flops, moved, seconds


def _names(prefix: str) -> tuple[str, ...]:
    return (f"{prefix}: kernels", "TFLOP", "GB", "ms")


def _cells(total: tuple[int, float, float, float] | None) -> tuple[str, ...]:
    if total is None:
        return ("-",) * 4
    count, flops, moved, seconds = total
    return f"{count:,}", f"{flops / 1e12:.2f}", f"{moved / 1e9:.1f}", f"{1000 * seconds:.1f}"


def _plan_names() -> tuple[str, ...]:
    return (f"MFU of {GOAL:.0%}", "ms", "clips/s per GPU", "MFU", "memory, GiB")


def _plan_cells(plan: Plan) -> tuple[str, ...]:
    memory = "-" if plan.memory is None else f"{plan.memory / GIB:.1f}"
    rate = plan.micro_batch / plan.seconds
    return f"{1000 * plan.seconds:.1f}", f"{rate:.2f}", f"{100 * plan.mfu:.1f} %", memory


def _over(mfu: float) -> str:
    return "reached" if mfu >= GOAL else "not reached"
