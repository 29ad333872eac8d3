"""Runs from directories: their numbers, differences, groups of seeds, data."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from tests.trainer.tracking.comparison.run_folders import make_run
from trainer.errors import RunError
from trainer.tracking.comparison.compare import compare
from trainer.tracking.comparison.differences import SAME, data_comparer, differences, seed_groups
from trainer.tracking.comparison.folder_source import find_compared_runs, read_folder
from trainer.tracking.comparison.results import deviation, group_table, results_table


def test_a_finished_run_has_the_numbers_of_its_summary(tmp_path: Path) -> None:
    run = read_folder(make_run(tmp_path / "run", top1={2: 0.6, 4: 0.5}))
    assert (run.name, run.status, run.notes) == ("run", "finished", [])
    assert run.results == pytest.approx(
        {
            "step": 4, "total_steps": 4, "train_loss": 1.875, "hours": 0.01, "gpu_hours": 0.02, "mfu": 0.31,
            "clips_per_second": 12.5, "data_wait_share": 0.2, "quarantined": 2,
        }
    )  # fmt: skip
    assert run.best is not None and run.last is not None
    assert (run.best.step, run.best.top1, run.last.top1, run.best_top5) == (2, 0.6, 0.5, 0.7)
    assert run.last.loss == 1.5
    assert run.recipe["optimisation.global_batch"] == "8" and run.global_batch == 8
    assert run.recipe["augmentation.crop_scale"] == "[0.6, 1.0]" and run.recipe["data.node_copy"] == "None"


def test_one_that_failed_has_those_of_its_last_step(tmp_path: Path) -> None:
    run = read_folder(make_run(tmp_path / "run", losses=(4.0, 3.0), end="failed"))
    assert (run.status, run.notes, run.best) == ("failed", ["failed: no room"], None)
    assert run.results == pytest.approx(
        {
            "step": 2, "total_steps": 4, "train_loss": 3.5, "hours": 0.005, "gpu_hours": 0.01, "mfu": 0.3,
            "clips_per_second": 12.0, "data_wait_share": 0.25, "quarantined": 1,
        }
    )  # fmt: skip
    assert read_folder(make_run(tmp_path / "left", losses=(4.0,), end="left")).status == "stopped"
    silent = read_folder(make_run(tmp_path / "silent", losses=(4.0,), end=""))
    assert silent.status == "unknown" and "no heartbeat" in silent.notes[0]


def test_one_that_is_training_is_running(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", losses=(4.0,), end="")
    now = {"event": "step", "time": time.time(), "step": 2, "loss": 3.5, "total_steps": 4, "spent": 18.0}
    with open(path / "events.jsonl", "a") as file:
        file.write(json.dumps(now) + "\n")
    run = read_folder(path)
    assert (run.status, run.results["step"], run.results["train_loss"]) == ("running", 2, 3.75)


def break_recipe(path: Path) -> None:
    (path / "recipe.yaml").write_text("a: &a [*a")


def bomb(path: Path) -> None:
    levels = "\n".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 12))
    (path / "recipe.yaml").write_text(f"l0: &l0 x\n{levels}\n")


def pipe_for_events(path: Path) -> None:
    (path / "events.jsonl").unlink()
    os.mkfifo(path / "events.jsonl")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (break_recipe, "recipe.yaml"),
        (bomb, "recipe.yaml"),
        (lambda path: (path / "recipe.yaml").write_bytes(b"\xff\xfe\x00"), "recipe.yaml"),
        (lambda path: (path / "recipe.yaml").write_text("[1, 2]"), "mapping"),
        (lambda path: (path / "summary.json").write_text('{"top1":'), "summary.json"),
        (lambda path: (path / "summary.json").write_text("[" * 100_000), "summary.json"),
        (lambda path: (path / "summary.json").unlink(), "summary.json"),
        (lambda path: (path / "events.jsonl").unlink(), "events.jsonl"),
    ],
)
def test_damaged_files_are_noted(tmp_path: Path, damage, said: str) -> None:  # type: ignore[no-untyped-def]
    path = make_run(tmp_path / "run", top1={4: 0.5})
    damage(path)
    run = read_folder(path)
    assert any(said in note for note in run.notes), run.notes
    other = read_folder(make_run(tmp_path / "other", top1={4: 0.4}))
    assert len(compare([run, other]).runs) == 2


def test_numbers_of_a_hostile_summary_are_left_out(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", top1={4: 0.5})
    (path / "summary.json").write_text(
        '{"steps": 4, "mfu": NaN, "gpu_hours": 1e300, "seconds": "x", "top1": []}'
    )
    run = read_folder(path)
    assert run.results["mfu"] == 0.3
    assert run.results["gpu_hours"] == pytest.approx(0.02)  # of the last step
    results_table([run])


def test_folders_are_found_one_level_deeper_too(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / "runs" / name) for name in ("a", "sweep/1", "sweep/2")]
    assert list(find_compared_runs(tmp_path / "runs")) == paths
    assert list(find_compared_runs(paths[0])) == paths[:1]
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "nowhere"):
        with pytest.raises(RunError, match=place.name):
            find_compared_runs(place)


def test_only_differing_fields_are_shown_by_section(tmp_path: Path) -> None:
    one = read_folder(make_run(tmp_path / "one", optimisation__learning_rate=1e-3, model__frames=8))
    other = read_folder(make_run(tmp_path / "other", seed=9, train_fingerprint="c" * 64))
    found = differences([one, other])
    assert [(difference.section, difference.field, difference.values) for difference in found] == [
        ("recipe", "seed", ("7", "9")),
        ("model", "model.frames", ("8", "4")),
        ("optimisation", "optimisation.learning_rate", ("0.001", "0.002")),
        ("data", "data.train (fingerprint)", ("a" * 12, "c" * 12)),
    ]
    assert differences([one, one]) == []


def test_a_field_that_one_version_lacks_differs_an_unknown_fingerprint_does_not(tmp_path: Path) -> None:
    one = read_folder(make_run(tmp_path / "one"))
    other = read_folder(make_run(tmp_path / "other", train_fingerprint=None))
    del other.recipe["optimisation.skipped_steps"]
    assert [(found.field, found.values) for found in differences([one, other])] == [
        ("optimisation.skipped_steps", ("10", None))
    ]


def test_seeds_are_grouped_to_mean_and_deviation(tmp_path: Path) -> None:
    accuracies = {1: 0.50, 2: 0.54, 3: 0.58}
    runs = [
        read_folder(make_run(tmp_path / f"seed{seed}", seed=seed, top1={4: top1}))
        for seed, top1 in accuracies.items()
    ]
    runs.append(read_folder(make_run(tmp_path / "seed4", seed=4, top1={2: 0.1}, end="failed")))
    runs.append(read_folder(make_run(tmp_path / "other", seed=1, optimisation__weight_decay=0.1)))
    runs.append(read_folder(make_run(tmp_path / "other_data", seed=5, train_fingerprint="c" * 64)))
    (group,) = seed_groups(runs)
    assert group == (0, 1, 2, 3)
    (row,) = group_table(runs, [group]).rows
    assert [cell.text for cell in row[:4]] == ["1-4", "3 of 4", "54.00 ± 4.00", "54.00 ± 4.00"]
    assert deviation([1.0, 2.0, 6.0]) == pytest.approx((3.0, 7**0.5))
    assert deviation([1.0]) == (1.0, None)


def test_the_best_of_each_column_is_marked_as_it_is_shown(tmp_path: Path) -> None:
    runs = [
        read_folder(make_run(tmp_path / "low", top1={4: 0.2}, losses=(1.0, 1.0, 1.0, 0.25))),
        read_folder(make_run(tmp_path / "high", top1={4: 0.500001})),
        read_folder(make_run(tmp_path / "none")),
        read_folder(make_run(tmp_path / "alike", top1={4: 0.5})),
    ]
    comparison = compare(runs)
    assert [run.name for run in comparison.runs] == ["high", "alike", "low", "none"]
    table = results_table(comparison.runs)
    heads = [column.head for column in table.columns]
    assert "status" not in heads and "step" not in heads
    best = {head: [row[1].text for row in table.rows if row[place].best] for place, head in enumerate(heads)}
    assert best["best top-1"] == best["top-1"] == ["high", "alike"]
    assert best["train loss"] == ["low"] and best["val loss"] == ["high", "alike"]
    assert best["hours"] == best["GPU-hours"] == best["clips/s"] == []
    assert [cell.text for cell in table.rows[3]][2:6] == ["-", "-", "-", "-"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({}, SAME),
        ({"engine__zero_stage": 2, "data__workers": 3}, SAME),
        ({"seed": 8}, "same manifests, other batches: seed (7 / 8)"),
        ({"optimisation__global_batch": 16}, "other batches: optimisation.global_batch (8 / 16)"),
        ({"model__frames": 8}, "same videos in the same order, other clips of them: model.frames (4 / 8)"),
        ({"augmentation__flip": 0.5}, "other clips of them: augmentation.flip (0.0 / 0.5)"),
        ({"model__overrides": {"resolution": 48}}, "resolution"),
        ({"data__decoder": "hybrid"}, "same batches, but for rounding in decoding: data.decoder"),
        ({"train_fingerprint": "c" * 64}, "other training manifests"),
        ({"train_fingerprint": None}, "whether the manifests are the same is not recorded"),
        (
            {"val_fingerprint": "c" * 64},
            "other validation manifests: their accuracies are of different videos",
        ),
        ({"evaluation__clips": 4}, "evaluated with other views: evaluation.clips (2 / 4)"),
    ],
)
def test_two_runs_are_compared_by_their_data(tmp_path: Path, change: dict, said: str) -> None:
    one = read_folder(make_run(tmp_path / "one"))
    words = data_comparer(one)(read_folder(make_run(tmp_path / "other", **change)))
    assert said in words
    assert (words == SAME) == (said == SAME)


def test_ratios_of_a_mixture_belong_to_the_order(tmp_path: Path) -> None:
    parts = [{"manifest": "a.arrow", "ratio": 3}, {"manifest": "b.arrow", "ratio": 1}]
    one = read_folder(make_run(tmp_path / "one", data__train=parts))
    moved = [{**part, "manifest": f"/elsewhere/{part['manifest']}"} for part in parts]
    assert data_comparer(one)(read_folder(make_run(tmp_path / "moved", data__train=moved))) == SAME
    other = [parts[0], {**parts[1], "ratio": 2}]
    words = data_comparer(one)(read_folder(make_run(tmp_path / "other", data__train=other)))
    assert "other batches: ratios in data.train (3:1 / 3:2)" in words


def test_hashes_of_batches_confirm_or_name_the_first_step(tmp_path: Path) -> None:
    one = read_folder(make_run(tmp_path / "one", batch_hashes="abcd"))
    same = read_folder(make_run(tmp_path / "same", batch_hashes="abcd"))
    assert data_comparer(one)(same) == (
        f"{SAME}; the batch hashes of all 4 steps that both recorded are the same"
    )
    other = read_folder(make_run(tmp_path / "other", batch_hashes="abxy"))
    assert "first differ at step 3, and in 2 of 4 steps" in data_comparer(one)(other)
    compare_data = data_comparer(one)
    assert "batch hashes of all 4 steps" in compare_data(same)
    (tmp_path / "one" / "events.jsonl").unlink()  # read once, however many runs are compared with it
    assert "first differ at step 3" in compare_data(other)
    without = read_folder(make_run(tmp_path / "without"))
    assert data_comparer(one)(without) == SAME


def test_an_older_run_has_its_fingerprint_in_a_checkpoint(tmp_path: Path) -> None:
    path = make_run(tmp_path / "old", train_fingerprint=None, val_fingerprint=None)
    checkpoint = path / "checkpoints" / "step-0000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.json").write_text(json.dumps({"settled": {"data.train (fingerprint)": "a" * 64}}))
    newer = path / "checkpoints" / "step-0000005"
    shutil.copytree(checkpoint, newer)
    (newer / "state.json").write_text("damaged")
    assert read_folder(path).data == {"train_fingerprint": "a" * 64}
