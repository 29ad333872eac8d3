"""The memory estimate compared with allocations of DeepSpeed and PyTorch on the CPU; available memory."""

import gc
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from models import UniFormerV2, UniFormerV2Config, build_config
from tests.trainer.ranks import Ranks
from trainer.config.schema import Recipe
from trainer.distributed.environment import find_environment
from trainer.engine.batch_plan import BatchPlan
from trainer.engine.deepspeed_engine import Engine
from trainer.engine.memory_estimate import (
    GIB,
    REDUCE_BUCKET,
    AvailableMemory,
    MemoryModel,
    find_available_memory,
    free_bytes,
)
from trainer.engine.process_group import connect, disconnect
from trainer.errors import RunError

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
CLIPS = 4
REPRESENTATIVE = (("fp32", 0),)
BUCKET_BYTES = {"fp32": (0, 4, 4, 4), "autocast": (0, 8, 8, 6)}
"""Bytes per element of all of DeepSpeed's buckets together, by stage."""


@pytest.fixture(scope="module")
def alone() -> Iterator[Ranks]:
    """Its own process: DeepSpeed keeps much of earlier engines, which would count."""
    with Ranks(1) as ranks:
        yield ranks


def recipe(stage: int = 0, precision: str = "fp32", ema_decay: float | None = None) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "test",
            "model": {"preset": "tiny", "form": "scene", "frames": 4},
            "data": {"train": "a", "val": "b", "prefetch": 2},
            "optimisation": {
                "global_batch": 2 * CLIPS,
                "steps": 5,
                "learning_rate": 1e-3,
                "ema_decay": ema_decay,
            },
            "engine": {"zero_stage": stage, "precision": precision},
            "evaluation": {"batch": 1},
        }
    )


def config() -> UniFormerV2Config:
    """2.8 M weights and activations of about twice their bytes: an error in either shows."""
    wide = {"width": 192, "depth": 6, "heads": 6, "global_layers": (5,), "patch_size": 16}
    return build_config("tiny", form="scene", frames=4, num_classes=10, **wide)


def needs(recipe: Recipe, *, ranks: int = 1, precision: str = "fp32", kind: str = "cpu") -> MemoryModel:
    return MemoryModel.of(recipe, config(), ranks=ranks, precision=precision, kind=kind)  # type: ignore[arg-type]


def held() -> int:
    """Bytes of all tensors in Python."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def highest(work: Callable[[], None]) -> int:
    """The most bytes that PyTorch held at a time during `work`, which frees all that it allocates.

    What another thread releases, as gloo's does when it is the last to let go of a tensor, the profiler does
    not see, and the tensor would count until the end: such a measurement is made again.
    """
    for _ in range(20):
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            work()
        assert profile.profiler is not None
        events = profile.profiler.kineto_results.events()
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        taken = list(itertools.accumulate(change for _, change in changes))
        if taken[-1] == 0:
            return max(taken)
    raise AssertionError(f"20 measurements in a row end with bytes not given back, the last with {taken[-1]}")


def estimate_by_measured(stage: int, precision: str) -> float:
    with mock.patch.object(F, "linear", F.linear):  # stage 3 puts its own in its place for good
        return _estimate_by_measured(stage, precision)


def measure_alone(stage: int, precision: str) -> None:
    connect(find_environment("cpu"))
    print(estimate_by_measured(stage, precision))
    disconnect()


def _estimate_by_measured(stage: int, precision: str) -> float:
    before = held()
    torch.manual_seed(0)
    asked = recipe(stage, precision, ema_decay=0.9)
    layout = BatchPlan(stage, CLIPS, accumulation=2, recomputed_blocks=0)
    engine = Engine(UniFormerV2(config()), asked, find_environment("cpu"), layout)
    engine.train()
    clips, labels = torch.randn(CLIPS, 3, 4, 64, 64), torch.arange(CLIPS)

    def micro_batch() -> None:
        engine.backward(F.cross_entropy(engine.forward(clips), labels))
        engine.step(1e-3)

    def step() -> None:
        micro_batch()
        micro_batch()

    step()
    of_all = needs(asked, precision=precision)
    estimate = of_all.estimate(zero_stage=stage, micro_batch=CLIPS, recomputed_blocks=0)
    # Of a bucket, only what the weights' gradients fill is ever touched, and takes memory.
    buckets = BUCKET_BYTES[precision][stage] * (REDUCE_BUCKET - of_all.trained)
    measured = held() - before + highest(step) - buckets
    return (estimate.total - estimate.reserve - estimate.clips + clips.nbytes) / measured


@pytest.mark.parametrize(
    ("precision", "stage"),
    [
        pytest.param(precision, stage, marks=[] if (precision, stage) in REPRESENTATIVE else pytest.mark.soak)
        for precision in ("fp32", "autocast")
        for stage in range(4)
    ],
)
def test_the_estimate_is_near_what_is_allocated(stage: int, precision: str) -> None:
    """In its own process, where no earlier work of DeepSpeed and PyTorch counts."""
    module = "tests.trainer.engine.test_memory_estimate"
    call = f"from {module} import measure_alone; measure_alone({stage}, {precision!r})"
    variables = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    result = subprocess.run(
        [sys.executable, "-c", call], env={**variables, "OMP_NUM_THREADS": "1"}, cwd=ROOT,
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert 0.94 < float(result.stdout.split()[-1]) < 1.06


def test_stages_share_the_states_among_the_ranks() -> None:
    def states(stage: int, ranks: int, precision: str = "fp32") -> list[float]:
        of_all = needs(recipe(ema_decay=0.9), ranks=ranks, precision=precision)
        estimate = of_all.estimate(zero_stage=stage, micro_batch=1, recomputed_blocks=0)
        parts = (estimate.weights, estimate.gradients, estimate.optimiser, estimate.ema)
        return [round(part / of_all.trained, 2) for part in parts]

    assert states(0, 4) == [4, 4, 8, 4]
    assert states(1, 4) == [4, 4, 3, 1]
    assert states(2, 4) == [4, 1, 3, 1]
    assert states(3, 4) == [1, 1, 3, 1]
    assert states(1, 1) == [4, 4, 12, 4]  # a master copy that a single rank has no use for
    assert states(1, 4, "bf16") == [2, 6, 3, 1]
    assert states(2, 4, "bf16") == [2, 1, 3, 1]


def test_a_gpu_has_its_buffers_whole_and_updates_in_one_kernel() -> None:
    of_gpu = needs(recipe(), kind="cuda")
    on_gpu = of_gpu.estimate(zero_stage=1, micro_batch=1, recomputed_blocks=0)
    assert on_gpu.working > 4 * REDUCE_BUCKET
    # Several kernels take two more copies of the gradients, and those that were flattened are freed: of so
    # many weights, more than the activations.
    large = replace(of_gpu, config=build_config("l14", form="scene", frames=4, num_classes=4))
    one_kernel, several = (
        replace(large, fused=fused).estimate(zero_stage=2, micro_batch=1, recomputed_blocks=24).working
        for fused in (True, False)
    )
    assert of_gpu.fused and several == 8 * large.trained > one_kernel


def test_blocks_after_recomputed_ones_keep_no_less_when_compiled() -> None:
    plain = needs(recipe(), kind="cuda")
    assert not plain.compiled
    asked = recipe()
    compiled = needs(
        asked.model_copy(update={"engine": asked.engine.model_copy(update={"compile": True})}), kind="cuda"
    )
    for blocks, differ in ((0, False), (1, True), (6, False)):
        one, other = (
            each.estimate(zero_stage=0, micro_batch=64, recomputed_blocks=blocks).total
            for each in (plain, compiled)
        )
        assert (other > one) == differ and other >= one


def test_evaluation_and_clips_made_ahead_count() -> None:
    asked = recipe()
    one, all_of_it, passes, more_passes = (
        needs(
            asked.model_copy(update={"evaluation": asked.evaluation.model_copy(update={"batch": batch})})
        ).estimate(zero_stage=0, micro_batch=1, recomputed_blocks=0)
        for batch in (1, 64, 500, 1000)
    )
    clip = 3 * 4 * 64 * 64 * 4
    # Of each loader two ahead and one in use; of training two kept for an inquiry, and one of a thread.
    assert (one.clips, all_of_it.clips) == (3 * 2 * clip + 3 * clip, 3 * 65 * clip + 3 * clip)
    assert all_of_it.working > one.working
    assert passes.working == more_passes.working  # several forward passes of the same size


def room_here() -> tuple[AvailableMemory, int, int]:
    """The memory of a run, of one rank and of four of a node, all read within milliseconds: other processes
    change it.
    """
    return find_available_memory(find_environment("cpu")), free_bytes(CPU, 1), free_bytes(CPU, 4)


def test_a_run_on_one_rank_has_the_memory_of_the_machine(alone: Ranks) -> None:
    ((room, free, of_four),) = alone.run(room_here)
    assert room.kind == "cpu"
    assert room.bytes == pytest.approx(free, rel=0.1)
    assert of_four == pytest.approx(free / 4, rel=0.1)


def machine(root: Path, membership: str, groups: dict[str, dict[str, str]]) -> Path:
    """A tree of /proc and /sys with 8 GiB available."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n")
    (root / "proc/self/cgroup").write_text(membership)
    for folder, files in groups.items():
        (root / "sys/fs/cgroup" / folder).mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (root / "sys/fs/cgroup" / folder / name).write_text(text)
    return root


def limited(limit: int | str, used: int, cached: int) -> dict[str, str]:
    return {
        "memory.max": f"{limit}\n",
        "memory.current": f"{used}\n",
        "memory.stat": f"anon 5\ninactive_file {cached}\nactive_file 7\n",
    }


@pytest.mark.parametrize(
    ("membership", "groups", "free"),
    [
        ("0::/\n", {}, 8 * GIB),
        ("0::/job/step\n", {"job/step": limited(4 * GIB, 2 * GIB, GIB // 2)}, 5 * GIB // 2),
        ("0::/job/step\n", {"job": limited(GIB, 0, 0), "job/step": limited("max", 0, 0)}, GIB),
        ("0::/not/seen/here\n", {"": limited(2 * GIB, GIB, 0)}, GIB),
        ("0::/job\n", {"job": limited(16 * GIB, 0, 0)}, 8 * GIB),
        (
            "5:devices:/a\n4:memory:/job\n0::/\n",
            {
                "memory/job": {
                    "memory.limit_in_bytes": str(3 * GIB),
                    "memory.usage_in_bytes": str(2 * GIB),
                    "memory.stat": f"inactive_file 9\ntotal_inactive_file {GIB}\n",
                },
                "memory": {
                    "memory.limit_in_bytes": "9223372036854771712",
                    "memory.usage_in_bytes": "1",
                    "memory.stat": "",
                },
            },
            2 * GIB,
        ),
    ],
    ids=["none", "own", "above", "container", "wide", "version 1"],
)
def test_a_control_group_limits_the_memory(
    tmp_path: Path, membership: str, groups: dict[str, dict[str, str]], free: int
) -> None:
    assert free_bytes(CPU, 1, machine(tmp_path, membership, groups)) == free
    assert free_bytes(CPU, 4, tmp_path) == free // 4


def test_an_unreadable_meminfo_names_the_fields_to_set(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"/proc/meminfo.*set engine\.micro_batch"):
        free_bytes(CPU, 1, tmp_path)
