"""Each job of `bench.py` with the smallest sizes: what it measures, and its report."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest

from launch import bench
from models import build_config
from models.cost import parameter_count
from pipelines.benchmark.measure import LoaderMeasurement
from pipelines.benchmark.task import TaskResult
from pipelines.benchmark.workload import Workload
from tests.integration.processes import ROOT
from trainer.benchmark import loader_rate, loop_costs, model_speed
from trainer.benchmark.budget import Plan, table_of_changes
from trainer.benchmark.child import MeasurementError, run_child
from trainer.benchmark.loop_task import PHASES
from trainer.benchmark.scaling import make_table
from trainer.benchmark.timing import OtherPrograms
from trainer.errors import RecipeError, RunError, UserError


def job(folder: Path, *arguments: str) -> dict:
    """The content of results.json."""
    bench.run(bench.parse([*arguments, "--out", str(folder)]))
    content = json.loads((folder / "results.json").read_text())
    assert content["job"] == arguments[0] and content["cores"] >= 1
    assert f"## {content['tables'][0]['title']}" in (folder / "results.md").read_text()
    return content


def rows(content: dict, number: int = 0) -> list[dict[str, str]]:
    table = content["tables"][number]
    return [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]


def test_model_measures_both_implementations_beside_the_limit(tmp_path):
    content = job(
        tmp_path,
        "model",
        "--form",
        "tiny",
        "--seconds",
        "0.2",
        "--repeats",
        "1",
        "--threads",
        "1",
        "--device",
        "cpu",
    )
    limits, this, plain = content["measurements"]
    assert limits["limits"]["flops_per_cpu_second"] > 1e9
    assert [this["implementation"], plain["implementation"]] == ["this model", "plain"]
    assert this["logits_difference"] == 0
    assert 0 < plain["logits_difference"] < 1e-4
    for each in (this, plain):
        for work in ("forward", "step"):
            assert each[work] and all(cost.keys() == {"seconds", "cpu"} for cost in each[work])
        assert each["peak_bytes"] > 2**20
    first, second = rows(content)
    assert first["step / this"] == "-" and second["step / this"].endswith("x")


def test_models_that_are_not_equal_are_refused():
    form, reference = model_speed.ON_CPU["tiny"], [[1.0, 2.0], [-4.0, 3.0]]
    with pytest.raises(RunError, match=r"logits of 'plain' differ by 0\.01 of the largest"):
        model_speed.check_equal(form, "plain", [[1.0, 2.0], [-4.0, 3.04]], reference, "fp32")
    with pytest.raises(RunError, match="differ by nan"):
        model_speed.check_equal(form, "plain", [[1.0, 2.0], [-4.0, float("nan")]], reference, "fp32")


def test_the_bound_of_equal_models_is_a_share_of_the_largest_logit():
    form, reference = model_speed.ON_CPU["tiny"], [[1.0, 2.0], [-4000.0, 3.0]]
    differences = model_speed.check_equal(form, "plain", [[1.0, 2.0], [-4000.0, 3.1]], reference, "fp32")
    assert differences == pytest.approx(0.1 / 4000, rel=1e-3)


def test_the_peak_is_that_of_the_tensors_that_live_at_the_same_time():
    script = (
        "import torch\n"
        "from trainer.benchmark.timing import mapped_tensors, peak_bytes\n"
        "mib = 2**18\n"
        "def work():\n"
        "    first, second = torch.ones(12 * mib), torch.ones(16 * mib)\n"
        "    del first\n"
        "    third = torch.ones(17 * mib)\n"
        "with mapped_tensors():\n"
        "    torch.ones(24 * mib)\n"  # has glibc keep smaller ones on its heap otherwise
        "    kept = [torch.ones(size * mib) for size in (13, 1, 18, 1, 18, 1)][1::2]\n"  # leaves three holes
        "    print(peak_bytes(work, torch.device('cpu')))"
    )
    command = [sys.executable, "-c", script]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    # 16 and 17; 45 where the first one's pages stay in its hole.
    assert 32 < int(done.stdout) / 2**20 < 37


def test_train_adds_up_to_the_whole_step(tmp_path, motion_set_settings, capsys):
    sizes = ["--steps", "4", "--repeats", "1", "--loader-seconds", "0.3"]
    run = tmp_path / "train-0/config.yaml"  # as of a user's run
    run.parent.mkdir()
    run.touch()
    content = job(tmp_path, "train", *sizes, *motion_set_settings)
    assert f"rendering {tmp_path}/motion: 72 of 72" in capsys.readouterr().out
    assert run.exists()
    (measured,) = content["measurements"]
    assert len(measured["steps"]) == 4
    for step in measured["steps"]:
        assert step.keys() == {*PHASES, "step"}
        # The phases lie in the step and not in each other, so together they take no longer.
        parts = sum(spent["seconds"] for name, spent in step.items() if name != "step")
        assert parts <= step["step"]["seconds"]
    assert measured["alone"] > 0 and measured["loader"]["decode"] > 0
    assert "Overhead, all but forward" in content["tables"][0]["notes"][0]
    assert [path.name for path in tmp_path.glob("train-*")] == ["train-0"]  # that of the round is deleted


def test_train_refuses_what_train_refuses_with_the_same_message(tmp_path):
    def refusal(*settings: str) -> str:
        words = [word for setting in settings for word in ("--set", setting)]
        with pytest.raises(UserError) as caught:
            bench.run(bench.parse(["train", "--out", str(tmp_path / "bench"), *words]))
        return str(caught.value)

    assert "optimisation.no_field" in refusal("optimisation.no_field=1")
    assert not (tmp_path / "bench").exists()  # no process was started
    missing = tmp_path / "train.arrow"
    message = refusal("data.embedded=null", f"data.train={missing}", "engine.device=cpu")
    assert str(missing) in message and "Error" not in message and "code" not in message
    assert not list((tmp_path / "bench").iterdir())


@pytest.fixture
def motion_set_settings(tmp_path):
    values = {
        "data.train": tmp_path / "motion/train.arrow",
        "data.val": tmp_path / "motion/val.arrow",
        "data.embedded.train_clips": 64,
        "data.embedded.val_clips": 8,
        "optimisation.global_batch": 8,
        "evaluation.batch": 8,
        "engine.device": "cpu",
    }
    return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


def test_checkpoint_saves_and_loads_all_of_the_state(tmp_path):
    other = tmp_path / "checkpoint/checkpoints/mine"  # not of this command
    other.mkdir(parents=True)
    content = job(tmp_path, "checkpoint", "--preset", "tiny", "--repeats", "1", "--device", "cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "results.json", "results.md"]
    assert other.exists()
    (measured,) = content["measurements"]
    weights = parameter_count(build_config("tiny", form="scene", frames=2, num_classes=400))
    assert measured["bytes"] == pytest.approx(12 * weights, rel=0.05)  # weights and two moments in float32
    (one,) = measured["rounds"]
    assert one.keys() == {"paused", "saved", "loaded", "disk_write", "disk_read", "others"}
    assert [row["what"].split()[0] for row in rows(content)] == ["copy", "save,", "load,"]
    assert not list(tmp_path.rglob("step-*"))


def test_scale_runs_the_ranks_together(tmp_path):
    sizes = ["--frames", "4", "--batch", "2", "--steps", "2", "--repeats", "1"]
    content = job(tmp_path, "scale", "--ranks", "2", *sizes, "--device", "cpu")
    (measured,) = content["measurements"]
    assert [rank["clips"] for rank in measured["results"]] == [4, 4]
    assert all(rank["cpu"] > 0 for rank in measured["results"])
    assert [row["ranks"] for row in rows(content)] == ["2"]


def test_efficiency_counts_cores_where_ranks_share_them():
    results = {1: 2.0, 2: 2.5, 4: 5.0}  # seconds for 10 clips a rank
    measurements = [
        {
            "ranks": count,
            "results": [
                {"clips": 10, "seconds": seconds, "cpu": 2.0, "others": 0.0, "core": rank % 2}
                for rank in range(count)
            ],
        }
        for count, seconds in results.items()
    ]
    table = make_table(measurements, "x", places=2)
    assert [row[4] for row in table.rows] == ["100 %", "80 %", "80 %"]
    assert [row[1] for row in table.rows] == ["", "", "4 ranks share 2 cores"]


def test_ranks_that_share_a_core_are_no_other_programs():
    def rank(core, others):
        return {"clips": 10, "seconds": 2.0, "cpu": 0.8, "others": others, "core": core}

    # On core 0, the second rank uses 0.4 of the 0.5 cores that the first one sees; on core 1 all.
    results = [rank(0, 0.5), rank(1, 0.4), rank(0, 0.5), rank(1, 0.4)]
    table = make_table([{"ranks": 4, "results": results}], "x", places=2)
    assert table.notes[1].startswith("Other programs used 0.10 to 0.10 cores")


def test_child_processes_are_no_other_programs():
    others = OtherPrograms()
    _, before, _ = others._read()
    worker = multiprocessing.get_context("spawn").Process(target=_use_cpu, args=(0.3,))
    worker.start()
    worker.join()
    _, after, _ = others._read()
    assert after - before >= 0.3


def _use_cpu(seconds: float) -> None:
    while time.process_time() < seconds:
        pass


def test_budget_of_a_recipe_needs_no_device_and_no_data(tmp_path):
    small = ["--set", "model.frames=4", "--set", "model.overrides.depth=2", "--ranks", "1"]
    plan = ["--micro-batch", "2", "--recomputed-blocks", "1"]
    content = job(tmp_path, "budget", "--recipe", "k400_b16", *small, *plan)
    kinds, changes, plans = (rows(content, number) for number in range(3))
    assert {"matrix products", "attention", "all"} <= {row["kind"] for row in kinds}
    assert [row["change"] for row in changes][:3] == [
        "1 block recomputed, uncompiled", "1 block recomputed, compiled", "nothing recomputed, uncompiled",
    ]  # fmt: skip
    rates = [float(row["clips/s per GPU"]) for row in changes]
    assert rates[1] > rates[0] and rates[2] > rates[0]
    assert rates[-1] == max(rates)
    assert plans and all(float(row["memory, GiB"]) < 80 for row in plans)


def test_no_plan_within_the_memory_is_an_error_below_the_tables(tmp_path, capsys):
    small = ["--set", "model.frames=4", "--set", "model.overrides.depth=2", "--set", "engine.micro_batch=1"]
    fixed = ["--set", "engine.recomputed_blocks=0", "--set", "engine.zero_stage=1"]
    arguments = ["--recipe", "k400_b16", *small, *fixed, "--memory", "0.01", "--out", str(tmp_path)]
    assert run_main("budget", *arguments) == 2
    printed = capsys.readouterr()
    assert "counting kernels: 4 of 4" in printed.out and "The fastest of" not in printed.out
    assert "error: no plan fits into --memory 0.01 GiB" in printed.err
    assert (tmp_path / "results.json").exists()


def test_changes_that_reach_the_goal_are_listed_by_the_memory_they_need():
    def plan(about, mfu, memory):
        return Plan(about, 1, 0, 1.0, mfu, memory)

    changes = [
        plan("small", 0.6, int(10e9)), plan("slow", 0.5, int(10e9)),
        plan("large", 0.6, int(90e9)), plan("unknown", 0.6, None), plan("bound: products", 0.8, None),
    ]  # fmt: skip
    assert table_of_changes(changes, 80.0).notes == (
        "An MFU of 55% within 80 GiB is reached with: small.",
        "Reached, but not within 80 GiB: large.",
        "Reached, without an estimate of the memory: unknown.",
    )
    assert table_of_changes(changes, 9.0).notes[:2] == (
        "No change with an estimate within 9 GiB brings the MFU to 55%.",
        "Reached, but not within 9 GiB: small; large.",
    )


def test_a_recipe_that_is_not_there_is_a_message(tmp_path):
    with pytest.raises(RecipeError, match="nowhere"):
        bench.run(bench.parse(["budget", "--recipe", "nowhere", "--out", str(tmp_path)]))


@pytest.mark.parametrize(
    ("arguments", "bounds"),
    [
        ("model --seconds 0", "no number of 0.001 or more"),
        ("train --loader-seconds inf", "no number of 0.001 or more"),
        ("budget --memory nan", "no number of 0.001 or more"),
        ("scale --ranks -1", "no whole number from 1 to 64"),
        ("model --threads 9999", "no whole number from 1 to "),
        ("pipeline --frames 0", "no whole number of 1 or more"),
        ("budget --recomputed-blocks -1", "no whole number of 0 or more"),
    ],
)
def test_a_number_out_of_bounds_is_refused(arguments, bounds, capsys):
    with pytest.raises(SystemExit):
        bench.parse(arguments.split())
    _, option, value = arguments.split()
    assert f"argument {option}: '{value}' is {bounds}" in capsys.readouterr().err


def test_each_job_has_a_folder_of_its_own():
    folders = {name: bench.parse([name]).out for name in bench.JOBS}
    assert folders == {name: Path("runs/bench", name) for name in bench.JOBS}


def test_no_recomputed_block_is_a_plan():
    assert bench.parse(["budget", "--recomputed-blocks", "0"]).recomputed_blocks == 0


def test_a_measurement_that_fails_says_why():
    with pytest.raises(MeasurementError, match=r"ended with code 1: .*no preset"):
        run_child("scaling_task:measure_rank", {"no preset": 1}, threads=1)


@pytest.mark.parametrize("end", [KeyboardInterrupt(), SystemExit(143), RunError("the disk is full")])
def test_results_before_an_error_are_printed_and_written(tmp_path, monkeypatch, capsys, end):
    def interrupted(args, report):
        rank = {"clips": 1, "seconds": 1.0, "cpu": 1.0, "others": 0.0, "core": 0}
        report.tables.append(make_table([{"ranks": 1, "results": [rank]}], "cut", 1))
        raise end

    monkeypatch.setattr(bench.scaling, "run", interrupted)
    (tmp_path / "results.json").write_text("of an earlier run")
    with pytest.raises(type(end)):
        bench.run(bench.parse(["scale", "--out", str(tmp_path)]))
    printed = capsys.readouterr()
    assert "ranks: cut" in printed.out and "earlier run" not in printed.err
    assert "ranks: cut" in (tmp_path / "results.md").read_text()
    full = mock.Mock(side_effect=OSError("no space left"))
    monkeypatch.setattr(bench.BenchmarkReport, "write", full)
    with pytest.raises(type(end)):  # not that of writing
        bench.run(bench.parse(["scale", "--out", str(tmp_path)]))
    assert "no space left" in capsys.readouterr().err


@pytest.mark.parametrize("name", bench.JOBS)
def test_results_of_an_earlier_run_are_named_if_nothing_is_measured(tmp_path, monkeypatch, capsys, name):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.JOBS[name], "run", interrupted)
    command = bench.parse([name, "--out", str(tmp_path)])
    with pytest.raises(KeyboardInterrupt):
        bench.run(command)
    assert "earlier run" not in capsys.readouterr().err
    results = tmp_path / "results.json"
    results.write_text("of an earlier run")
    with pytest.raises(KeyboardInterrupt):
        bench.run(command)
    assert f"the results in {tmp_path} are of an earlier run" in capsys.readouterr().err
    assert results.read_text() == "of an earlier run"


def test_loaders_measured_before_an_error_are_printed_and_written(tmp_path, monkeypatch, capsys):
    def measure(loaders, workloads, *_):
        yield LoaderMeasurement(loaders[0], workloads[0], 0, TaskResult(problem="no such library"))
        raise KeyboardInterrupt

    workload = Workload("own.arrow", "own", 8)
    monkeypatch.setattr(loader_rate, "combine_workloads", lambda *_: [workload])
    monkeypatch.setattr(loader_rate, "measure_all", measure)
    with pytest.raises(KeyboardInterrupt):
        bench.run(bench.parse(["pipeline", "--videos", "own.arrow", "--out", str(tmp_path)]))
    assert "no such library" in capsys.readouterr().out
    assert "no such library" in (tmp_path / "results.md").read_text()


def test_a_folder_that_cannot_be_written_is_found_before_measuring(tmp_path, capsys):
    assert run_main("scale", "--out", "/proc/nowhere") == 2
    assert "error: --out /proc/nowhere: /proc cannot be written" in capsys.readouterr().err


def run_main(*arguments: str) -> int:
    """The exit code of the command."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bench.py", *arguments])
        patch.setattr(bench, "exit_on_sigterm", lambda _: None)
        return bench.main()


def test_a_mistake_in_a_recipe_is_the_message_of_the_command(tmp_path, capsys):
    """All lines of it, without the process that found it and without a folder."""
    wrong = ["--set", "foo.bar=1", "--set", "optimisation.lrx=2"]
    assert run_main("train", "--out", str(tmp_path), *wrong) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "Error:" not in error
    assert "foo: no such field" in error and "lrx" in error
    assert not list(tmp_path.iterdir())


def test_a_training_without_a_step_that_counts_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop_costs, "run_child", lambda *_, **__: {"steps": []})
    assert run_main("train", "--out", str(tmp_path), "--set", "data.embedded=null") == 2
    assert "--steps" in capsys.readouterr().err


def test_ratios_and_shares_of_the_limit_are_those_of_the_medians():
    form = model_speed.ON_CPU["tiny"]
    flops = model_speed._flops(form)

    def measured(name, seconds, peak):
        step = [{"seconds": 2 * seconds, "cpu": factor * seconds} for factor in (1, 1, 9)]
        own = {"implementation": name, "forward": step, "step": step, "peak_bytes": peak, "others": 0.0}
        return {**own, "precision": "fp32", "form": "tiny", "device": "cpu"}

    limits = {"flops_per_cpu_second": flops / 2, "bytes_per_second": 1e9, "others": 0.0}
    measurements = [
        {"form": "tiny", "device": "cpu", "limits": limits},
        measured("this model", 4.0, 2**20),
        measured("plain", 6.0, 3 * 2**20),
    ]
    (table,) = model_speed.make_tables(measurements, {"tiny": form})
    this, plain = table.rows
    assert this[4:8] == ("4", "50 %", "0.25", "1")
    assert plain[-3:] == ("1.50x", "1.50x", "3.00x")
