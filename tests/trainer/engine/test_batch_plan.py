"""Which batch plan is chosen for a memory, with which reasons and advice."""

import dataclasses
import re
from functools import cache
from itertools import product
from typing import Any

import pytest

from models import UniFormerV2Config, build_config
from trainer.config.schema import Recipe
from trainer.engine.batch_plan import (
    BatchPlan,
    EarlierPlan,
    Plan,
    _stages,
    choose_batch_plan,
    order_of_plans,
)
from trainer.engine.memory_estimate import GIB, AvailableMemory, MemoryEstimate, MemoryModel
from trainer.engine.step_cost import StepCost
from trainer.errors import RecipeError, RunError
from trainer.system.device import Precision

L14 = build_config("l14", form="scene", frames=8, num_classes=400)


def recipe(engine: Any, *, global_batch: int = 512, repeats: int = 1) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "test",
            "model": {"preset": "l14", "form": "scene", "frames": 8},
            "data": {"train": "a", "val": "b"},
            "sampling": {"repeats": repeats},
            "optimisation": {"global_batch": global_batch, "steps": 5, "learning_rate": 1e-5},
            "engine": engine,
        }
    )


def chosen(
    gib: float,
    engine: Any = "auto",
    *,
    ranks: int = 8,
    config: UniFormerV2Config = L14,
    precision: Precision = "fp32",
    earlier: EarlierPlan | None = None,
    **batch: int,
) -> BatchPlan:
    return choose_batch_plan(
        recipe(engine, **batch),
        config,
        ranks,
        precision=precision,
        available=AvailableMemory("cuda", int(gib * GIB)),
        earlier=earlier,
    )


def need(plan: BatchPlan, ranks: int = 8, precision: Precision = "fp32", **changes: int) -> MemoryEstimate:
    """The estimate of a plan, with some of its values changed."""
    of_all = MemoryModel.of(recipe("auto"), L14, ranks=ranks, precision=precision, kind="cuda")
    fields = {name: getattr(plan, name) for name in ("zero_stage", "micro_batch", "recomputed_blocks")}
    return of_all.estimate(**{**fields, **changes})


def plain(plan: BatchPlan) -> tuple[int, int, int, int]:
    return plan.zero_stage, plan.micro_batch, plan.accumulation, plan.recomputed_blocks


def test_numbers_of_the_recipe_are_kept() -> None:
    asked = {"zero_stage": 2, "micro_batch": 24, "recomputed_blocks": 3}
    assert chosen(400, asked) == BatchPlan(2, 16, 4, 3)
    assert chosen(400, {"zero_stage": 0}) == BatchPlan(0, 64, 1, 0)
    assert plain(chosen(1, asked)) == (2, 16, 4, 3)


def test_a_plan_that_does_not_fit_has_advice_each_of_which_is_enough() -> None:
    asked = {"zero_stage": 1, "micro_batch": 32, "recomputed_blocks": 0}
    tight = chosen(30, asked)
    assert plain(tight) == (1, 32, 2, 0)
    changes = dict(re.findall(r"engine\.(\w+): (\w+) \([\d.]+ GiB", " ".join(tight.advice)))
    assert {"micro_batch", "recomputed_blocks"} <= changes.keys()
    for name in ("micro_batch", "recomputed_blocks"):
        changed = chosen(30, {**asked, name: int(changes[name])})
        assert changed.advice == (), name
        nearer = {"micro_batch": 2 * int(changes[name]), "recomputed_blocks": int(changes[name]) - 1}[name]
        assert chosen(30, {**asked, name: nearer}).advice != ()
    assert any(line.startswith("engine: auto") for line in tight.advice)
    (nothing,) = chosen(1, asked).advice
    assert "model.frames" in nothing and "auto with evaluation.batch: 1 would still need" in nothing


def test_an_evaluation_of_too_many_views_is_advised_to_change() -> None:
    large = recipe({"zero_stage": 1, "micro_batch": 1, "recomputed_blocks": 24})
    evaluation = large.evaluation.model_copy(update={"batch": 64, "clips": 4, "crops": 3})
    large = large.model_copy(update={"evaluation": evaluation})
    available = AvailableMemory("cuda", 25 * GIB)
    (line,) = choose_batch_plan(large, L14, 8, precision="fp32", available=available).advice
    batch = int(re.findall(r"evaluation\.batch: (\d+)", line)[0])
    fitting = large.model_copy(update={"evaluation": evaluation.model_copy(update={"batch": batch})})
    assert choose_batch_plan(fitting, L14, 8, precision="fp32", available=available).advice == ()


def test_with_enough_memory_nothing_is_recomputed_or_partitioned() -> None:
    plan = chosen(400)
    assert plain(plan) == (0, 64, 1, 0)
    assert "that is a rank's whole share of the global batch" in plan.why[0]
    assert plan.why[1] == "engine.recomputed_blocks auto: 0 of 24, 64 clips fit without recomputation"
    assert plan.why[2] == "engine.zero_stage auto: 0, nothing more needs to be partitioned"


def seconds(plan: BatchPlan, precision: Precision = "fp32") -> float:
    """Of a clip, on paper, with 8 ranks."""
    memory = MemoryModel.of(recipe("auto"), L14, ranks=8, precision=precision, kind="cuda")
    cost = StepCost(memory, plan.micro_batch * plan.accumulation)
    return cost.seconds_per_clip(plan.zero_stage, plan.micro_batch, plan.recomputed_blocks)


@cache
def every_plan(precision: Precision) -> dict[Plan, tuple[int, tuple[int, ...]]]:
    """Each plan with 8 ranks: its bytes, and what it is ordered by."""
    memory = MemoryModel.of(recipe("auto"), L14, ranks=8, precision=precision, kind="cuda")
    cost = StepCost(memory, clips=64)
    lowest = 1 if precision == "bf16" else 0
    found = {}
    for plan in product(range(lowest, 4), [2**power for power in range(7)], range(25)):
        stage, size, blocks = plan
        estimate = memory.estimate(zero_stage=stage, micro_batch=size, recomputed_blocks=blocks)
        found[plan] = estimate.total, order_of_plans(cost.seconds_per_clip(*plan), plan)
    return found


@pytest.mark.parametrize("gib", [10.5, 11, 12, 13, 14, 16, 20, 30, 60, 79.6, 120])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_plan_that_fits_is_faster_on_paper(gib: float, precision: Precision) -> None:
    fitting = {plan: order for plan, (total, order) in every_plan(precision).items() if total <= gib * GIB}
    plan = chosen(gib, precision=precision)
    best = min(fitting, key=lambda plan: fitting[plan])
    assert (plan.zero_stage, plan.micro_batch, plan.recomputed_blocks) == best
    assert plan.micro_batch * plan.accumulation * 8 == 512


def test_a_plan_that_is_better_in_nothing_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StepCost, "seconds_per_clip", None)  # a call would raise TypeError
    assert plain(chosen(400)) == (0, 64, 1, 0)


def chosen_or_none(gib: float) -> BatchPlan | None:
    try:
        return chosen(gib)
    except RunError:
        return None


def test_more_memory_never_makes_it_worse() -> None:
    plans = [plan for gib in range(5, 60) if (plan := chosen_or_none(gib))]
    costs = [seconds(plan) for plan in plans]
    assert costs == sorted(costs, reverse=True)
    assert plans[0].recomputed_blocks > plans[-1].recomputed_blocks == 0


def test_a_resumed_run_keeps_its_plan_where_it_fits() -> None:
    first, free = chosen(40), chosen(400)
    assert plain(first)[:2] != plain(free)[:2]
    earlier = EarlierPlan(first.micro_batch, first.zero_stage, "as before")
    for gib in (40, 60, 400):
        plan = chosen(gib, earlier=earlier)
        assert plain(plan)[:3] == plain(first)[:3]
        assert plan.recomputed_blocks <= first.recomputed_blocks
        assert plan.why[0] == f"engine.micro_batch auto: {first.micro_batch} clips, as before"
        assert plan.why[2] == f"engine.zero_stage auto: {first.zero_stage}, as in the checkpoint"
        assert len(plan.why) == 3, "it is not chosen for its time"
    less = chosen(20, earlier=EarlierPlan(free.micro_batch, free.zero_stage, "as before"))
    assert less == chosen(20)
    for stage in (None, 3):  # any, and one that the recipe does not allow
        size_only = EarlierPlan(first.micro_batch, stage, "as before")
        other = chosen(400, {"zero_stage": 2, "micro_batch": "auto"}, earlier=size_only)
        assert (other.zero_stage, other.micro_batch) == (2, first.micro_batch)
    assert plain(chosen(400, earlier=EarlierPlan(first.micro_batch, None, ""))) == (
        0, first.micro_batch, first.accumulation, 0,
    )  # fmt: skip


def test_each_field_may_be_left_to_auto_alone() -> None:
    size = chosen(60, {"zero_stage": 1, "micro_batch": "auto"})
    assert (size.zero_stage, size.recomputed_blocks, len(size.why)) == (1, 0, 1)
    assert need(size).total <= 60 * GIB < need(size, micro_batch=2 * size.micro_batch).total
    blocks = chosen(60, {"zero_stage": 1, "micro_batch": 32, "recomputed_blocks": "auto"})
    assert (blocks.zero_stage, blocks.micro_batch, len(blocks.why)) == (1, 32, 1)
    assert blocks.recomputed_blocks > 0
    stage = chosen(23.5, {"zero_stage": "auto", "micro_batch": 4, "recomputed_blocks": 0})
    assert (stage.micro_batch, stage.recomputed_blocks, len(stage.why)) == (4, 0, 1)
    assert stage.zero_stage > 0


def test_the_reasons_have_the_numbers_that_decided() -> None:
    plan = chosen(10.5)
    stage, size, _, recomputed = plain(plan)
    assert stage > 0 and recomputed > 0 and size == 1

    def gib(estimate: MemoryEstimate) -> str:
        return f"{estimate.total / GIB:.1f} GiB"

    micro_batch, blocks, zero, fastest = plan.why
    assert micro_batch.startswith(f"engine.micro_batch auto: 1 clip, {gib(need(plan))} of 10.5 GiB; ")
    fewer = need(plan, recomputed_blocks=recomputed - 1)
    assert blocks == (
        f"engine.recomputed_blocks auto: {recomputed} of 24; with {recomputed - 1}, 1 clip would need "
        f"{gib(fewer)} of 10.5 GiB"
    )
    lower = need(plan, zero_stage=stage - 1)
    assert zero == (
        f"engine.zero_stage auto: {stage}; with {stage - 1}, 1 clip would need {gib(lower)} of 10.5 GiB"
    )
    assert fastest.startswith(
        f"micro-batch 1, {recomputed} of 24 blocks recomputed, ZeRO {stage}: {1000 * seconds(plan):.1f} ms a "
        "clip on paper (an H100, not compiled), the fastest that fits; others: micro-batch "
    )
    found = re.search(r"(\d+) would need ([\d.]+) GiB even with all 24 blocks recomputed", chosen(9.5).why[0])
    assert found is not None and float(found[2]) > 9.5


def test_one_rank_partitions_nothing() -> None:
    plan = chosen(79.6, ranks=1)
    assert plan.zero_stage == 0
    assert any(line.startswith("engine.zero_stage auto: 0, ") for line in plan.why)


def test_bf16_begins_with_the_stage_that_adds_up_in_fp32() -> None:
    assert chosen(400, precision="bf16").zero_stage == 1
    assert chosen(400, precision="bf16", ranks=1).zero_stage == 1
    given = chosen(400, {"zero_stage": 0}, precision="bf16")
    assert given.zero_stage == 1
    assert "ZeRO stage 1, although engine.zero_stage is 0" in given.why[0]


def test_with_batch_norm_the_number_of_clips_that_it_averages_over_is_named() -> None:
    temporal = build_config("b16", form="temporal", frames=16, num_classes=174)
    plan = chosen(79.6, config=temporal)
    (line,) = [line for line in plan.why if "batch norms" in line]
    assert f"over {8 * plan.micro_batch} clips, engine.micro_batch x 8" in line
    assert f"set engine.micro_batch to {plan.micro_batch} " in line
    given = chosen(79.6, {"zero_stage": "auto", "micro_batch": 4}, config=temporal)
    assert not any("batch norms" in line for line in given.why)


@pytest.mark.parametrize(("compiled", "highest"), [(False, 3), (True, 2)])
def test_a_compiled_model_is_never_partitioned_by_stage_3(compiled: bool, highest: int) -> None:
    asked = recipe({"zero_stage": "auto", "compile": compiled})
    stages, _ = _stages(asked, 8, "fp32")
    assert stages[-1] == highest


def test_repeats_stay_together() -> None:
    plan = chosen(30, ranks=2, global_batch=96, repeats=3)
    assert plan.micro_batch % 3 == 0
    assert plan.micro_batch * plan.accumulation * 2 == 96


def test_a_training_that_cannot_fit_is_refused_with_numbers_and_advice() -> None:
    with pytest.raises(RunError) as caught:
        chosen(4, ranks=1)
    text = str(caught.value)
    assert "1 clip per rank and forward pass would need " in text
    assert " of 4.0 GiB even with all 24 blocks recomputed" in text
    assert "What helps: engine.precision: bf16, more ranks" in text
    with pytest.raises(RunError, match=r" GiB of 10 MiB even with "):
        chosen(0.01, ranks=1)
    with pytest.raises(RunError, match=r"does not fit with engine\.micro_batch 64: .* engine: auto, which"):
        chosen(20, {"zero_stage": "auto", "micro_batch": 64, "recomputed_blocks": "auto"})
    with pytest.raises(RecipeError, match="over 7 ranks"):
        chosen(80, ranks=7)


def test_recomputed_blocks_of_the_config_are_ignored() -> None:
    other = dataclasses.replace(L14, recomputed_blocks=5)
    assert chosen(14.5, config=other) == chosen(14.5)
