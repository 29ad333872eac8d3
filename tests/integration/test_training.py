"""Whole runs in real processes: equal results for all numbers of ranks and ZeRO stages, and after a stop.

The runs have repeated sampling, an average of the weights, dropout, drop path and batch norm over all ranks.
They have no accumulation, because batch norm is over the clips of one pass.
"""

import json
import shutil
import signal
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file

import trainer
from pipelines.augment.params import ViewSpec
from pipelines.autotune import LoaderOptions
from pipelines.dataset.concat import Dataset
from pipelines.dataset.manifest import Manifest, write_manifest
from pipelines.loader import view_loader
from pipelines.sampling.sampler import ViewSampler
from pipelines.synthetic.motion import CLASS_NAMES
from tests.conftest import MotionSet
from tests.integration.processes import (
    ROOT,
    SMALL,
    Outcome,
    Training,
    events,
    losses,
    settings,
    train,
    typed,
)
from trainer.checkpoint.best_weights import BestWeights, write_best
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.weights import SavedWeights, load_weights
from trainer.inference import model_source
from trainer.monitoring.run_dir import RunDir
from trainer.resilience.signals import REQUEUE

STEPS = 20
SHORT_SIDE = 48  # the videos have 72 pixels
ALL_AT_ONCE = {
    "optimisation__ema_decay": 0.9,
    "sampling__repeats": 2,
    "augmentation__max_short_side": SHORT_SIDE,
}


def in_stage(stage: int) -> Sequence[str]:
    return settings(**ALL_AT_ONCE, engine__zero_stage=stage)


@pytest.fixture(scope="module")
def undisturbed(motion_set: MotionSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of one rank."""
    run_dir = tmp_path_factory.mktemp("runs") / "undisturbed"
    outcome = train(run_dir, *in_stage(0), data=motion_set.root)
    assert outcome.code == 0, outcome.errors
    return run_dir


@dataclass(frozen=True)
class Launched:
    run_dir: Path
    store: str
    """Address of the MLflow store."""
    stopped: Outcome
    """The start that received SIGTERM."""
    output: str
    """Output of the start that resumed."""


@pytest.fixture(scope="module")
def launched(motion_set: MotionSet, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """The same run with two ranks in ZeRO stage 2 and MLflow. SIGTERM to one rank stops it; then DeepSpeed's
    command resumes it.
    """
    folder = tmp_path_factory.mktemp("launched")
    run_dir, store = folder / "run", f"sqlite:///{folder}/mlflow.db"
    variables = {"MLFLOW_TRACKING_URI": store, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    tracked = [*in_stage(2), "--set", "tracking.enabled=true", "--set", "tracking.every_steps=5"]
    first = Training(run_dir, *tracked, data=motion_set.root, ranks=2, variables=variables)
    first.wait_for_step(2)
    first.signal(signal.SIGTERM, rank=1)
    stopped = first.wait()
    result = typed(
        "deepspeed", "--num_gpus", "2", "launch/train.py",
        "--recipe", str(SMALL), "--run-dir", str(run_dir),
        "--set", f"data.train={motion_set.train}", "--set", f"data.val={motion_set.val}", *tracked,
        folder=ROOT, variables=variables,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return Launched(run_dir, store, stopped, result.stdout)


def test_a_finished_run_has_all_its_files(undisturbed: Path) -> None:
    assert len(losses(undisturbed)) == STEPS
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert {
        "top1",
        "top5",
        "steps",
        "clips_per_second",
        "data_wait_share",
        "seconds",
        "parameters",
        "gmacs",
    } <= set(summary)
    assert summary["steps"] == STEPS
    assert summary["videos"] == 16
    weights = load_weights(undisturbed / "weights.safetensors")
    assert weights.model(torch.zeros(1, 3, 4, 32, 32)).shape == (1, 8)
    assert weights.class_names[0] == "move_left"
    assert weights.preprocessing["mean"] == [0.45, 0.45, 0.45]
    assert (undisturbed / "confusion.png").stat().st_size > 1000
    scores = pq.read_table(undisturbed / "scores.parquet").to_pydict()
    assert scores["row"] == list(range(16))
    right = [label == found for label, found in zip(scores["label"], scores["prediction"], strict=True)]
    assert summary["top1"] == sum(right) / 16 and summary["loss"] > 0 and 0 <= summary["ece"] <= 1
    assert [path.name for path in (undisturbed / "checkpoints").glob("step-*")] == ["step-0000020"]
    assert {event["bad_clips"] for event in events(undisturbed, "step")} == {0}


def test_a_prediction_has_the_scores_of_the_evaluation_of_the_run(
    undisturbed: Path, motion_set: MotionSet
) -> None:
    loaded = load_weights(undisturbed / "weights.safetensors")
    dataset = Dataset.open([motion_set.val])
    clip = ViewSpec(4, 32, clips=2, crops=3, max_short_side=SHORT_SIDE)
    colours = {"mean": (0.45,) * 3, "std": (0.225,) * 3}
    options = LoaderOptions(torch.device("cpu"), workers=1, threads=1, prefetch=2)
    loader = view_loader(dataset, ViewSampler(16, 3, 1), clip, **colours, rank=0, options=options)
    expected, labels = torch.zeros(16, 8), torch.zeros(16, dtype=torch.int64)
    with closing(loader), torch.no_grad():
        for batch in loader:
            scores = loaded.model(batch.clips.flatten(0, 1)).softmax(-1).unflatten(0, (-1, 6)).mean(1)
            expected[batch.ids[batch.valid]] = scores[batch.valid]
            labels[batch.ids[batch.valid]] = batch.labels[batch.valid]

    found = trainer.load(undisturbed).predict([dataset.path(k) for k in range(16)], clips=2, crops=3)

    assert np.abs(np.stack([each.scores for each in found]) - expected.numpy()).max() < 1e-6
    right = [each.top[0][0] == loaded.class_names[label] for each, label in zip(found, labels, strict=True)]
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert sum(right) / 16 == summary["top1"]
    paths = [each.path for each in found]
    by_workers = list(trainer.load(undisturbed).stream(paths, clips=2, crops=3, workers=2))
    assert [each.path for each in by_workers] == paths
    assert np.abs(np.stack([each.scores for each in by_workers]) - expected.numpy()).max() < 1e-6


def test_the_best_weights_are_beside_the_last_ones_and_are_the_default(
    undisturbed: Path, tmp_path: Path
) -> None:
    run = RunDir(Path(shutil.copytree(undisturbed, tmp_path / "run")))
    retention = Retention(run.checkpoints, keep_last=1, keep_best=True)
    assert write_best(run, retention, 20) == BestWeights(
        20, retention.accuracies()[20], "weights.safetensors"
    )
    assert not run.best_weights.exists() and str(open_source(run.path)) == str(run.weights)

    (run.checkpoints / "accuracy.json").write_text('{"10": 0.9, "20": 0.9, "30": 0.5}')
    assert write_best(run, retention, 30) == BestWeights(10, 0.9, None)  # its checkpoint is gone
    (run.checkpoints / "accuracy.json").write_text('{"10": 0.4, "20": 0.9, "30": 0.5}')
    best = write_best(run, retention, 30)
    assert best == BestWeights(20, 0.9, "weights-best.safetensors")
    summary = json.loads(run.summary.read_text())
    summary |= {"best_top1": 0.9, "best_step": 20, "best_weights": best.file}
    run.summary.write_text(json.dumps(summary))
    assert load_file(run.best_weights).keys() == load_file(run.weights).keys()
    assert open_source(run.path) == run.best_weights and open_source(run.path, last=True) == run.weights
    (run.checkpoints / "accuracy.json").write_text('{"20": 0.95}')  # the run has resumed
    assert open_source(run.path) == run.checkpoints / "step-0000020"
    run.summary.write_text('{"best_weights": ["../../x"], "best_top1": 1e999}')
    assert open_source(run.path) == run.checkpoints / "step-0000020"


def open_source(run: Path, last: bool = False) -> Path | None:
    """The file or the checkpoint that the model of a run is read from."""
    read: list[Path] = []

    def noted(source: Path) -> SavedWeights:
        read.append(source)
        return load_weights(undamaged)

    undamaged = run / "weights.safetensors"
    with (
        mock.patch.object(model_source, "load_weights", noted),
        mock.patch.object(model_source, "_from_checkpoint", noted),
    ):
        model_source.open_model(run, last=last)
    return read[0]


def test_deepspeed_trains_and_mlflow_has_the_records(launched: Launched) -> None:
    assert f"mlflow ui --backend-store-uri {launched.store}" in launched.output
    client = MlflowClient(launched.store)
    (run,) = client.search_runs([client.get_experiment_by_name("small").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["model.preset"] == "tiny"
    assert run.data.params["optimisation.learning_rate"] == "0.002"
    steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]
    last_of_first_start = max(event["step"] for event in events(launched.run_dir, "left"))
    assert set(steps) == {1, 5, 10, 15, 20, last_of_first_start}
    summary = json.loads((launched.run_dir / "summary.json").read_text())
    metrics = run.data.metrics
    assert metrics["val/top1"] == metrics["best/top1"] == metrics["whole_run/top1"] == summary["top1"]
    assert metrics["whole_run/gpu_hours"] == summary["gpu_hours"] > 2 * summary["seconds"] / 3600 * 0.99
    assert run.data.tags["starts"] == "2"
    (_, started) = events(launched.run_dir, "start")
    assert run.data.tags["val_fingerprint"] == started["val_fingerprint"]
    assert {"wall_clock/clips_per_second", "wall_clock/data_wait_share", "train/gradient_norm"} <= set(
        metrics
    )
    assert {entry.tags[0].value for entry in run.inputs.dataset_inputs} == {"training", "validation"}
    assert abs((run.info.end_time - run.info.start_time) / 1000 - summary["seconds"]) < 0.01
    assert run.data.tags["mlflow.note.content"].startswith("**small**")
    models = client.search_logged_models([run.info.experiment_id], "metrics.`val/top1` >= 0")
    assert [model.name for model in models] == ["step-0000020"]
    artifacts = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"recipe.yaml", "environment.json", "confusion.png", "summary.json"} <= artifacts


def test_a_run_that_receives_sigterm_saves_and_resumes(launched: Launched) -> None:
    """Other tests of this file compare its losses with those of an undisturbed run."""
    assert launched.stopped.code == REQUEUE, launched.stopped.errors
    assert "give the same command again" in launched.stopped.output
    stopped_after = events(launched.run_dir, "left")[0]["step"]
    assert 2 <= stopped_after < STEPS
    assert f"resuming after step {stopped_after}" in launched.output
    done = [event["step"] for event in events(launched.run_dir, "step")]
    assert done == list(range(1, STEPS + 1)), "no step is lost or done twice"


@pytest.mark.parametrize("stage", [2, *(pytest.param(stage, marks=pytest.mark.soak) for stage in (0, 1, 3))])
def test_two_ranks_train_as_one_rank(
    undisturbed: Path, motion_set: MotionSet, tmp_path: Path, request: pytest.FixtureRequest, stage: int
) -> None:
    if stage == 2:
        run_dir = request.getfixturevalue("launched").run_dir
    else:
        run_dir = tmp_path / "run"
        outcome = train(run_dir, *in_stage(stage), data=motion_set.root, ranks=2)
        assert outcome.code == 0, outcome.errors
    assert {event["world_size"] for event in events(run_dir, "start")} == {2}
    torch.testing.assert_close(losses(run_dir), losses(undisturbed), atol=1e-5, rtol=0)
    assert max(losses(undisturbed)) - min(losses(undisturbed)) > 0.05  # it learns
    one, two = (
        [event["batch_hash"] for event in events(folder, "step")] for folder in (undisturbed, run_dir)
    )
    assert one == two and len(set(one)) == STEPS, "the ranks and the stop changed a clip"
    one, two = (json.loads((folder / "summary.json").read_text()) for folder in (undisturbed, run_dir))
    assert (one["videos"], one["top1"], one["top5"]) == (two["videos"], two["top1"], two["top5"])
    weights = [load_file(folder / "weights.safetensors") for folder in (undisturbed, run_dir)]
    assert set(weights[0]) == set(weights[1])
    for name, tensor in weights[0].items():
        other = weights[1][name]
        if name.endswith("qkv.bias"):
            # Softmax does not see the keys' bias: its gradient is rounding, which Adam blows up.
            keys = slice(len(tensor) // 3, 2 * len(tensor) // 3)
            other[keys] = tensor[keys]
        # Adam divides by small numbers elsewhere too: rounding grows over 20 steps of 2e-3.
        torch.testing.assert_close(other, tensor, atol=1e-3, rtol=0, msg=name)


@pytest.mark.soak
def test_a_stopped_run_equals_an_undisturbed_run(motion_set: MotionSet, tmp_path: Path) -> None:
    """SIGTERM to one of two ranks, bit for bit. Other signals, precisions and stages: test_resume.py.

    It stops between a step and the evaluation after it.
    """
    undisturbed, run_dir = tmp_path / "undisturbed", tmp_path / "run"
    changes = [*in_stage(2), *settings(evaluation__every_steps=1)]
    outcome = train(undisturbed, *changes, data=motion_set.root, ranks=2)
    assert outcome.code == 0, outcome.errors
    first = Training(run_dir, *changes, data=motion_set.root, ranks=2)
    first.wait_for_step(2)
    first.signal(signal.SIGTERM, rank=1)
    outcome = first.wait()
    assert outcome.code == REQUEUE, outcome.errors
    assert "give the same command again" in outcome.output
    stopped_after = events(run_dir, "left")[0]["step"]
    assert 2 <= stopped_after < STEPS
    outcome = train(run_dir, *changes, data=motion_set.root, ranks=2)
    assert outcome.code == 0, outcome.errors
    assert f"resuming after step {stopped_after}" in outcome.output
    assert losses(run_dir) == losses(undisturbed) and len(losses(run_dir)) == STEPS
    evaluated, others = (
        [(event["step"], event["top1"], event["loss"]) for event in events(run, "evaluation")]
        for run in (run_dir, undisturbed)
    )
    assert evaluated == others and len(others) == STEPS
    weights, expected = (load_file(run / "weights.safetensors") for run in (run_dir, undisturbed))
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.soak
def test_a_finished_run_is_not_trained_again(
    undisturbed: Path, motion_set: MotionSet, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    outcome = train(run_dir, *in_stage(0), data=motion_set.root)
    assert outcome.code == 0, outcome.errors
    assert len(losses(run_dir)) == STEPS
    refused = train(run_dir, "--resume", "never", data=motion_set.root)
    assert refused.code == 2
    assert "--run-dir" in refused.errors


@pytest.mark.soak
def test_bad_videos_are_named_and_excluded(motion_set: MotionSet, tmp_path: Path) -> None:
    data = tmp_path / "set"
    shutil.copytree(motion_set.root, data)
    broken = sorted((data / "train").rglob("*.*"))[:4]  # more than the three that are always tolerated
    broken[0].unlink()
    broken[1].write_bytes(b"")
    broken[2].write_text("no video")
    broken[3].write_bytes(bytes(1000))
    run_dir = tmp_path / "run"
    patient = settings(data__bad_share=0.2, optimisation__steps=8)
    outcome = train(run_dir, *patient, data=data, ranks=2)
    assert outcome.code == 0, outcome.errors
    quarantined = [json.loads(line) for line in (run_dir / "quarantine.jsonl").read_text().splitlines()]
    assert {entry["path"] for entry in quarantined} == {str(path) for path in broken}
    assert sum(event["bad_clips"] for event in events(run_dir, "step")) == 8  # 64 clips, 2 epochs
    assert all(str(path) in outcome.output for path in broken)

    strict = train(tmp_path / "strict", *settings(data__bad_share=0.01), data=data, ranks=2)
    assert strict.code == 2
    assert "quarantine.jsonl" in strict.errors
    assert "Traceback" not in strict.errors
    assert list((tmp_path / "strict" / "checkpoints").glob("step-*"))


def test_a_changed_recipe_is_refused_by_name_and_changes_nothing(
    undisturbed: Path, motion_set: MotionSet
) -> None:
    before = (undisturbed / "recipe.yaml").read_text()
    changes = {"seed": 8, "model__overrides.width": 64}
    outcome = train(undisturbed, *in_stage(0), *settings(**changes), data=motion_set.root)
    assert outcome.code == 2
    assert "seed: 7 then, 8 now" in outcome.errors
    assert "model.overrides.width: 32 then, 64 now" in outcome.errors
    assert "Traceback" not in outcome.errors
    assert (undisturbed / "recipe.yaml").read_text() == before


@pytest.mark.soak
def test_other_videos_and_classes_are_refused_unless_allowed(
    undisturbed: Path, motion_set: MotionSet, tmp_path: Path
) -> None:
    """The same videos, one fewer, under another order of the classes."""
    run_dir, data = tmp_path / "run", tmp_path / "set"
    shutil.copytree(undisturbed, run_dir)
    shutil.copytree(motion_set.root, data)
    for part in ("train", "val"):
        manifest = Manifest.open(data / f"{part}.arrow")
        names = manifest.class_names[::-1]
        rows = [manifest.row(index) for index in range(len(manifest) - (part == "train"))]
        (data / f"{part}.arrow").unlink()
        write_manifest(data / f"{part}.arrow", rows, names)
    outcome = train(run_dir, *in_stage(0), data=data)
    assert outcome.code == 2
    refused = "data.train (fingerprint)", "data.train (class names)"
    for name in refused:
        assert f"{name}: " in outcome.errors and f"--allow-change '{name}'" in outcome.errors
    assert '["move_left"' in outcome.errors and "Traceback" not in outcome.errors
    assert (run_dir / "events.jsonl").read_text() == (undisturbed / "events.jsonl").read_text()
    one = train(run_dir, "--allow-change", refused[0], *in_stage(0), data=data)
    assert one.code == 2 and f"{refused[0]}: " not in one.errors and f"{refused[1]}: " in one.errors
    allowed = [part for name in refused for part in ("--allow-change", name)]
    outcome = train(run_dir, *allowed, *in_stage(0), data=data)
    assert outcome.code == 0, outcome.errors
    assert load_weights(run_dir / "weights.safetensors").class_names == CLASS_NAMES[::-1]


@pytest.mark.soak
def test_a_compiled_model_trains_as_an_eager_one(
    undisturbed: Path, motion_set: MotionSet, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    outcome = train(run_dir, *in_stage(0), *settings(engine__compile="true"), data=motion_set.root)
    assert outcome.code == 0, outcome.errors
    torch.testing.assert_close(losses(run_dir), losses(undisturbed), atol=1e-3, rtol=0)


@pytest.mark.soak
def test_engine_auto_changes_no_loss(undisturbed: Path, motion_set: MotionSet, tmp_path: Path) -> None:
    """`engine: auto` chooses stage, micro-batch and recomputed blocks."""
    run_dir = tmp_path / "run"
    outcome = train(run_dir, *settings(**ALL_AT_ONCE), data=motion_set.root, recipe=auto_recipe(tmp_path))
    assert outcome.code == 0, outcome.errors
    torch.testing.assert_close(losses(run_dir), losses(undisturbed), atol=1e-5, rtol=0)


def auto_recipe(folder: Path) -> Path:
    """The small recipe with `engine: auto`."""
    recipe, path = yaml.safe_load(SMALL.read_text()), folder / "auto.yaml"
    path.write_text(yaml.safe_dump({**recipe, "engine": "auto"}))
    return path


@pytest.mark.soak
def test_engine_auto_continues_with_the_micro_batch_of_the_checkpoint(
    motion_set: MotionSet, tmp_path: Path
) -> None:
    """As if the first attempt had less memory. A batch norm sees the clips of a micro-batch."""
    fixed = [*in_stage(0), *settings(engine__micro_batch=4)]
    outcome = train(tmp_path / "whole", *fixed, data=motion_set.root)
    assert outcome.code == 0, outcome.errors
    run_dir = tmp_path / "stopped"
    first = Training(run_dir, *fixed, data=motion_set.root)
    first.wait_for_step(2)
    first.signal(signal.SIGTERM)
    assert first.wait().code == REQUEUE
    outcome = train(run_dir, *settings(**ALL_AT_ONCE), data=motion_set.root, recipe=auto_recipe(tmp_path))
    assert outcome.code == 0, outcome.errors
    assert "engine.micro_batch auto: 4 clips, as in the checkpoint" in outcome.output + outcome.errors
    assert losses(run_dir) == losses(tmp_path / "whole") and len(losses(run_dir)) == STEPS


def test_diverged_weights_are_not_saved(motion_set: MotionSet, tmp_path: Path) -> None:
    wild = settings(
        optimisation__learning_rate=1,
        optimisation__warmup_steps=0,
        optimisation__clip_norm="null",
        optimisation__skipped_steps=3,
        run__checkpoint_every_steps=1,
    )
    script = Path(__file__).with_name("wild_rate.py")
    path = {"PYTHONPATH": str(Path(__file__).parents[2])}
    outcome = train(tmp_path / "run", *wild, data=motion_set.root, script=script, variables=path)
    assert outcome.code == 2
    assert "learning_rate" in outcome.errors
    assert "Traceback" not in outcome.errors
    assert len(events(tmp_path / "run", "skipped")) == 4
    # The weights of step 1 are finite, but no gradient at them is: they cannot be resumed from.
    assert not list((tmp_path / "run" / "checkpoints").glob("*step-*"))


@pytest.mark.soak
def test_resuming_from_an_older_checkpoint_sets_later_ones_aside(
    motion_set: MotionSet, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    often = settings(run__checkpoint_every_minutes=0.0001, run__keep_last=30)
    assert train(run_dir, *often, data=motion_set.root).code == 0
    saved = [event["step"] for event in events(run_dir, "checkpoint")]
    assert len(saved) > 3
    assert min(later - sooner for sooner, later in pairwise(saved[:-1])) >= 2
    back = run_dir / "checkpoints" / f"step-{saved[1]:07d}"
    outcome = train(run_dir, "--resume", str(back), *settings(run__keep_last=1), data=motion_set.root)
    assert outcome.code == 0, outcome.errors
    names = {path.name for path in (run_dir / "checkpoints").glob("step-*")}
    assert names == {"step-0000020"}
    assert len(list((run_dir / "checkpoints").glob("set-aside-step-*"))) == len(saved) - 2


@pytest.mark.soak
def test_a_frozen_backbone_is_exported_from_any_stage(motion_set: MotionSet, tmp_path: Path) -> None:
    exported = []
    for stage in (0, 3):
        run_dir = tmp_path / str(stage)
        frozen = {
            "model__form": "scene",  # the temporal form changes the backbone
            "model__overrides.frozen_backbone": "true",
            "engine__zero_stage": stage,
            "optimisation__steps": 5,
        }
        outcome = train(run_dir, *settings(**frozen), data=motion_set.root)
        assert outcome.code == 0, outcome.errors
        exported.append(load_file(run_dir / "weights.safetensors"))
    for name, tensor in exported[0].items():
        torch.testing.assert_close(exported[1][name], tensor, atol=1e-4, rtol=0, msg=name)
