"""The preflight: checks of one node, checks between two ranks, the table and the command."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from rich.console import Console

import launch.doctor
import pipelines.dali.selftest
from models import build_config
from models.cost import parameter_count
from pipelines.dali.selftest import decode_test_video
from pipelines.synthetic.motion import CLASS_NAMES
from tests.conftest import MotionSet
from tests.integration.processes import ROOT, SMALL
from tests.trainer.ranks import Ranks
from trainer.cluster.preflight import checks, runner
from trainer.cluster.preflight.checks import (
    FRAMES,
    CheckResult,
    Status,
    check_node,
    judge_decoding,
    judge_gpu,
    judge_gpu_count,
    judge_space,
    run_check,
)
from trainer.cluster.preflight.control_channel import (
    SIZES,
    ControlChannel,
    answer_folder_check,
    check_shared_folder,
    judge_all_reduce,
    measure_all_reduce,
)
from trainer.cluster.preflight.report import (
    CHECKS,
    format_nodes,
    format_table,
    merge_results,
    worst,
    write_failures,
)
from trainer.config.load import load_recipe
from trainer.distributed.environment import Environment, find_environment
from trainer.engine.memory_estimate import GIB
from trainer.errors import RunError
from trainer.setup.checkpoint_space import checkpoint_bytes, checkpoints_to_come
from trainer.system.gpu import multiplies_exactly, query_smi
from trainer.system.timeouts import PREFIX, has_hung_threads

SKIPPED, OK, WARNING, FAILED = Status
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture
def alone() -> Environment:
    return find_environment("cpu", {})


# One node


@pytest.mark.parametrize(
    ("seen", "needed", "ranks", "status"),
    [
        (8, 8, 8, OK),
        (7, 8, 8, FAILED),
        (0, 8, 8, FAILED),
        (0, 0, 2, SKIPPED),
        (8, 4, 4, WARNING),
        (8, 0, 1, OK),
    ],
)
def test_a_node_needs_a_gpu_per_rank(seen: int, needed: int, ranks: int, status: Status) -> None:
    result = judge_gpu_count(seen, needed, ranks)
    assert result.status is status
    assert str(seen) in result.text or status is SKIPPED


@pytest.mark.parametrize(
    ("seen", "given", "statuses"),
    [
        (["", "", "", ""], {}, [SKIPPED, SKIPPED]),
        (["a", "b", "c", "d"], {}, [OK, OK]),  # each sees its own
        (["ab", "ab", "cd", "cd"], {}, [OK, OK]),
        (["a", "a", "cd", "cd"], {}, [FAILED, OK]),
        (["ab", "ab", "", ""], {}, [OK, FAILED]),
        (["ab", "ab", "", ""], {"device": "cpu"}, [OK, SKIPPED]),
        (["", "", "", ""], {"device": "cuda"}, [FAILED, FAILED]),
        (["ab", "ab", "cd", "cd"], {"required": 3}, [FAILED, FAILED]),
        (["abc"], {"alone": True}, [OK]),
        ([""], {"alone": True, "device": "cuda"}, [FAILED]),
    ],
)
def test_the_gpus_of_a_node_are_those_its_ranks_see(
    seen: list[str], given: dict[str, Any], statuses: list[Status]
) -> None:
    nodes = {rank: f"n{rank // 2 + 1}" for rank in range(len(seen))}
    options = {"device": "auto", "alone": False, "required": None, **given}
    reports = {rank: {"gpus": list(gpus)} for rank, gpus in enumerate(seen)}
    results = runner.check_gpu_counts(nodes, reports, **options)
    assert [result.status for _, result in results] == statuses


@pytest.mark.parametrize(
    ("values", "exact", "status", "token"),
    [
        ({}, True, OK, "no nvidia-smi"),
        ({}, False, FAILED, "products differ"),
        ({"ecc.errors.uncorrected.volatile.total": "0"}, True, OK, ""),
        ({"ecc.errors.uncorrected.volatile.total": "[N/A]"}, True, OK, ""),
        ({"ecc.errors.uncorrected.volatile.total": "3"}, True, FAILED, "memory errors: 3"),
        ({"retired_pages.pending": "Yes"}, True, FAILED, "reset"),
        ({"remapped_rows.pending": "1"}, True, FAILED, "reset"),
        ({"remapped_rows.failure": "1"}, True, FAILED, "no spare memory"),
    ],
)
def test_errors_that_the_driver_counts(
    values: dict[str, str], exact: bool, status: Status, token: str
) -> None:
    result = judge_gpu(3, values, exact=exact)
    assert result.status is status
    assert token in result.text
    assert status is OK or (result.text.startswith("GPU 3: ") and result.advice)


def test_the_values_of_one_gpu_are_read_whatever_nvidia_smi_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        'case "$1" in *new*) echo "Field is not a valid field to query."; exit 2;; esac\n'
        'echo "GPU-aa, 550.54.15, 0"; echo "GPU-bb, 550.54.15, 2"\n'
    )
    program.chmod(0o755)
    fields = ("driver_version", "errors")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert query_smi("gpu", fields, "GPU-bb") == {"driver_version": "550.54.15", "errors": "2"}
    assert query_smi("gpu", fields, "GPU-cc") == {}
    assert query_smi("gpu", ("new",), "GPU-aa") == {}
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert query_smi("gpu", fields, "GPU-aa") == {}


def test_decoding_counts_frames_and_names_the_error() -> None:
    assert judge_decoding(1, 0, json.dumps({"frames": FRAMES}), "").status is OK
    for result, token in (
        (judge_decoding(1, 0, '{"frames": 15}', ""), "15 of 16"),
        (judge_decoding(1, 1, "", "Traceback\nno decoder"), "GPU 1: no decoder"),
        (judge_decoding(1, -11, "", ""), "signal 11"),
    ):
        assert result.status is FAILED
        assert token in result.text


def test_a_clip_made_here_is_decoded_with_all_its_frames() -> None:
    assert decode_test_video(CPU, FRAMES) == [FRAMES, 128, 128, 3]


def test_a_decoder_that_returns_other_frames_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although it returns as many frames as requested."""
    right = pipelines.dali.selftest.check_encoded

    def one_later(*arguments: object) -> object:
        encoded = right(*arguments)  # type: ignore[arg-type]
        return replace(encoded, indices=np.minimum(encoded.indices + 1, FRAMES - 1))

    monkeypatch.setattr(pipelines.dali.selftest, "check_encoded", one_later)
    with pytest.raises(RuntimeError, match="15 of 16 frames are not those"):
        decode_test_video(CPU, FRAMES)


def test_products_are_compared_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    assert multiplies_exactly(CPU)
    right = torch.Tensor.__matmul__

    def wrong_in_bf16(left: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        product = right(left, other)
        if left.dtype == torch.bfloat16:
            product[7, 7] += 1
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong_in_bf16)
    assert not multiplies_exactly(CPU)


def test_a_disk_too_full_for_one_checkpoint_fails_and_for_all_warns() -> None:
    def status_of(free: int) -> Status:
        return judge_space("disk", free, least=3, wanted=9, advice="").status

    assert [status_of(free) for free in (2, 3, 8, 9)] == [FAILED, WARNING, WARNING, OK]


def test_checkpoints_need_what_is_not_there_yet(
    tmp_path: Path, motion_set: MotionSet, alone: Environment
) -> None:
    given = [f"data.train={motion_set.train}", f"data.val={motion_set.val}", "run.keep_last=3"]
    recipe = load_recipe(SMALL, given)
    model = recipe.model
    config = build_config(
        model.preset, form=model.form, frames=model.frames, num_classes=len(CLASS_NAMES), **model.overrides
    )
    assert checkpoint_bytes(recipe) == 12 * parameter_count(config)
    assert checkpoint_bytes(
        load_recipe(SMALL, [*given, "optimisation.ema_decay=0.9"])
    ) == 16 * parameter_count(config)
    assert checkpoints_to_come(recipe, tmp_path) == 5
    for step in (1, 2):
        (tmp_path / f"checkpoints/step-{step:07d}").mkdir(parents=True)
    assert checkpoints_to_come(recipe, tmp_path) == 3


def test_a_disk_that_is_too_small_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: Environment
) -> None:
    free = shutil.disk_usage(tmp_path).free

    def disk(size: int) -> CheckResult:
        monkeypatch.setattr(checks, "checkpoint_bytes", lambda recipe: size)
        results, _ = check_node(alone, CPU, tmp_path / "not/there/yet", load_recipe(SMALL))
        return merge_results(("n1", result) for result in results)["disk"]["n1"]

    assert disk(free + GIB).status is FAILED
    assert disk(free // 3).status is WARNING
    assert "5 more checkpoints of " in disk(free // 3).advice
    assert disk(free // 10).status is OK


def test_manifests_are_compared_by_fingerprint(
    tmp_path: Path, motion_set: MotionSet, alone: Environment
) -> None:
    def manifests(*given: str) -> tuple[CheckResult, dict[str, str]]:
        results, facts = check_node(alone, CPU, tmp_path, load_recipe(SMALL, given))
        return merge_results(("n1", result) for result in results)["manifests"]["n1"], facts["manifests"]

    here = (f"data.train={motion_set.train}", f"data.val={motion_set.val}")
    result, prints = manifests(*here)
    assert result.status is OK
    assert len(prints) == 2
    assert all(len(value) == 12 for value in prints.values())
    result, _ = manifests(here[0], f"data.val={tmp_path}/none.arrow", "data.embedded=null")
    assert result.status is FAILED
    assert f"{tmp_path}/none.arrow does not exist" in result.text
    damaged = tmp_path / "damaged.arrow"
    damaged.write_bytes(b"no manifest")
    result, _ = manifests(here[0], f"data.val={damaged}")
    assert result.status is FAILED
    assert "is not a manifest" in result.text


def test_a_check_that_breaks_or_hangs_is_a_failed_check() -> None:
    (broken,) = run_check("disk", lambda: [1 / 0])  # type: ignore[list-item]
    assert broken.status is FAILED
    assert "ZeroDivisionError" in broken.text
    (refused,) = run_check("memory", _refuse)
    assert (refused.status, refused.text) == (FAILED, "no /proc here")
    assert not has_hung_threads()
    gate = threading.Event()
    (late,) = run_check("memory", lambda: [gate.wait()], 0.1)  # type: ignore[list-item]
    assert late.status is FAILED
    assert "not end within 0.1 s" in late.text
    assert has_hung_threads()
    gate.set()
    for thread in threading.enumerate():
        if thread.name.startswith(PREFIX):
            thread.join()
    assert not has_hung_threads()


def _refuse() -> list[CheckResult]:
    raise RunError("no /proc here")


# Between nodes


def test_the_slowest_rank_s_time_counts_and_wrong_sums_fail() -> None:
    measured = {rank: (0.01 * (rank + 1), 0) for rank in range(4)}
    rate = 1.5 * SIZES["cpu"][0] / 0.04 / 1e9
    results = judge_all_reduce(measured, "cpu", 4, None)
    assert {result.status for result in results.values()} == {OK}
    assert all(f"{rate:.2f} GB/s" in result.text for result in results.values())
    for least, status in ((0.99 * rate, OK), (1.01 * rate, FAILED)):
        assert {result.status for result in judge_all_reduce(measured, "cpu", 4, least).values()} == {status}
    results = judge_all_reduce({0: (0.01, 0), 1: "refused", 2: (0.01, 0)}, "cpu", 4, None)
    failed = {rank: result.text for rank, result in results.items() if result.status is FAILED}
    assert failed == {1: "refused", 3: "no answer"}
    measured[2] = (0.01, 17)
    results = judge_all_reduce(measured, "cpu", 4, None)
    assert [rank for rank, result in results.items() if result.status is FAILED] == [2]
    assert "17 elements" in results[2].text


def test_nodes_that_differ_from_most_are_named() -> None:
    usual = {"torch": "2.9", "Python": "3.11"}
    facts = {"n1": usual, "n2": {**usual, "torch": "2.8"}, "n3": usual, "n4": {"Python": "3.11"}}
    found = dict(runner.compare_facts("versions", facts))
    assert found.keys() == {"n2", "n4"}
    assert found["n2"].text == "torch: 2.8, elsewhere 2.9"
    assert found["n4"].text == "torch: missing, elsewhere 2.9"
    assert {result.status for result in found.values()} == {FAILED}
    assert not list(runner.compare_facts("versions", {"n1": usual, "n2": usual}))


# The table


def test_the_worst_result_of_a_node_s_ranks_counts() -> None:
    table = merge_results(
        [
            ("n1", CheckResult("GPU health", OK, "fine")),
            ("n1", CheckResult("GPU health", FAILED, "GPU 3: broken", "reset")),
            ("n1", CheckResult("GPU health", FAILED, "GPU 5: broken", "reset")),
            ("n1", CheckResult("GPU health", WARNING, "GPU 6: hot")),
        ]
    )
    assert list(table) == ["GPU health"]
    assert table["GPU health"]["n1"].text == "GPU 3: broken; GPU 5: broken"


def test_a_thousand_nodes_take_a_few_lines() -> None:
    nodes = {f"n{number}": CheckResult("disk", OK, f"{number} free") for number in range(100, 1100)}
    nodes["n200"] = nodes["n300"] = CheckResult("disk", FAILED, "1 free", "clear it")
    nodes["n400"] = CheckResult("disk", WARNING, "5 free", "clear some")
    assert format_nodes(nodes) == [
        "n200, n300: 1 free",
        "-> clear it",
        "n400: 5 free",
        "-> clear some",
        "997 nodes: ok",
    ]
    alike = {node: CheckResult("disk", FAILED, "1 free", "clear it") for node in nodes}
    assert format_nodes(alike) == ["n100, n101, n102, n103 and 996 more: 1 free", "-> clear it"]
    different = {node: CheckResult("disk", FAILED, f"{node} is full") for node in nodes}
    lines = format_nodes(different)
    assert len(lines) == 6
    assert lines[-1] == "and 995 more nodes"
    assert format_nodes({"n1": CheckResult("disk", OK, "5 free")}) == ["5 free"]


def test_the_table_fits_80_columns_and_has_no_colours_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    found = [("n1", CheckResult(check, OK, "well [not a style] " * 10)) for check in CHECKS]
    table = format_table(merge_results([*found, ("n2", CheckResult("disk", FAILED, "full"))]))
    Console(width=80).print(table)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "\x1b" not in printed
    assert "[not a" in printed
    assert all(f"\n{check}" in printed for check in CHECKS)


def test_failed_nodes_are_written_for_the_script_and_removed_when_none_fails(tmp_path: Path) -> None:
    bad = CheckResult("disk", FAILED, "full")
    ok, warning = CheckResult("disk", OK, ""), CheckResult("memory", WARNING, "low")
    table = merge_results([("n1", ok), ("n2", bad), ("n2", warning)])
    file = tmp_path / "slurm/preflight.json"
    assert write_failures(tmp_path, table) == file
    assert json.loads(file.read_text()) == {"failed": {"n2": ["disk: full"]}, "everywhere": []}
    assert {check: worst(nodes) for check, nodes in table.items()} == {"disk": FAILED, "memory": WARNING}
    # To exclude all nodes would leave none.
    write_failures(tmp_path, merge_results([("n1", bad), ("n2", bad)]))
    assert json.loads(file.read_text()) == {"failed": {}, "everywhere": ["disk: full"]}
    assert write_failures(tmp_path, merge_results([("n1", warning), ("n2", ok)])) is None
    assert not file.exists()


# Two ranks


def _share(folders: tuple[Path, Path], seconds: float) -> dict[int, CheckResult]:
    channel = _channel("share")
    if channel.rank == 0:
        return check_shared_folder(channel, folders[0], [1], seconds)
    answer_folder_check(channel, channel.receive("folder", 60), folders[1], seconds)
    return {}


def test_a_folder_that_both_see(pair: Ranks, tmp_path: Path) -> None:
    run = tmp_path / "runs/new"
    found = pair.run(_share, (run, run), 20.0)[0]
    assert [found[rank].status for rank in (0, 1)] == [OK, OK]
    assert list(tmp_path.iterdir()) == []  # nothing is left
    (run / "slurm").mkdir(parents=True)
    (run / "slurm/turns.jsonl").write_text("kept")
    pair.run(_share, (run, run), 20.0)
    assert [path.name for path in run.rglob("*")] == ["slurm", "turns.jsonl"]


def test_a_folder_that_one_node_does_not_see(pair: Ranks, tmp_path: Path) -> None:
    found = pair.run(_share, (tmp_path / "here", tmp_path / "there"), 0.5)[0]
    assert found[0].status is OK
    assert found[1].status is FAILED
    assert "does not hold what rank 0 wrote" in found[1].text
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(pair: Ranks, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    found = pair.run(_share, (file / "run", file / "run"), 0.5)[0]
    assert found[0].status is FAILED
    assert "cannot write in" in found[0].text


def _measure(mistaken: bool) -> tuple[float, int]:
    rank = dist.get_rank()
    # A rank that adds the values of another imitates a link that corrupts data.
    return measure_all_reduce(CPU, 2, 5 if mistaken and rank == 1 else rank)


def test_sums_over_ranks_are_exact(pair: Ranks) -> None:
    for seconds, wrong in pair.run(_measure, False):
        assert wrong == 0
        assert seconds > 0
    for _, wrong in pair.run(_measure, True):
        assert wrong == SIZES["cpu"][0] // 4


def _collect() -> Any:
    channel = _channel("collect")
    if channel.rank == 1:
        channel.send("word", {"a": 1})
        return channel.receive("broadcast", 60)
    channel.broadcast("broadcast", "well")
    values = channel.collect("word", [1], 60), channel.collect("word", [0, 1], 0.2)
    try:
        channel.receive("missing", 0.2)
    except TimeoutError as error:
        return *values, str(error)


def test_a_rank_that_sends_nothing_is_left_out(pair: Ranks) -> None:
    first, second, problem = pair.run(_collect)[0]
    assert first == second == {1: {"a": 1}}
    assert "missing" in problem


def _preflight(folder: Path) -> tuple[int, str]:
    """A preflight in which the checks of rank 1 take longer than rank 0 waits; its code and output."""
    place = find_environment("cpu")
    place = replace(place, local_rank=0, node=f"n{place.rank + 1}", nodes=("n1", "n2"))
    preflight = runner.Preflight(REQUEST, None, place, CPU, folder, _channel("preflight"))
    gone = threading.Event()
    patience = mock.patch.object(runner, "REPORT_TIMEOUT", 0.5)
    hanging = mock.patch.object(
        runner, "check_node", lambda *_: (gone.wait(3.0), [CheckResult("disk", OK, "")], {})[1:]
    )
    with patience, hanging if place.rank else nullcontext(), redirect_stdout(io.StringIO()) as output:
        return preflight.run(), output.getvalue()


def test_a_node_that_does_not_report_is_named_and_nobody_waits_for_it(pair: Ranks, tmp_path: Path) -> None:
    (code, output), _ = pair.run(_preflight, tmp_path)
    assert code == 1
    assert "n2: rank 1: no answer" in output
    assert "some rank did not answer" in output
    written = json.loads((tmp_path / "slurm/preflight.json").read_text())
    assert written == {"failed": {"n2": ["ranks: rank 1: no answer"]}, "everywhere": []}


_number = 0


def _channel(name: str) -> ControlChannel:
    """Under keys of its own: the ranks stay between tests."""
    global _number
    _number += 1
    store = dist.distributed_c10d._get_default_store()
    return ControlChannel(dist.get_rank(), dist.PrefixStore(f"{name}-{_number}", store))


# The command

REQUEST = runner.PreflightRequest(
    folder=None, recipe=None, overrides=(), gpus_per_node=None, min_bandwidth=None, patience=5.0
)


def test_ranks_that_do_not_connect_are_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, rendezvous: float) -> None:
        raise RunError("n7 did not come")

    monkeypatch.setattr(runner, "connect", refuse)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # to be as they were, afterwards
        monkeypatch.delenv(name)
    assert runner.preflight(replace(REQUEST, folder=tmp_path)) == 1
    assert capsys.readouterr().err == "error: n7 did not come\n"
    written = json.loads((tmp_path / "slurm/preflight.json").read_text())
    assert written == {"failed": {}, "everywhere": ["ranks: n7 did not come"]}


def typed(*arguments: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch/doctor.py"), *arguments],
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "80", "OMP_NUM_THREADS": "1", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_alone_as_typed(tmp_path: Path) -> None:
    process = typed("--folder", str(tmp_path / "run"), "--gpus-per-node", "0")
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, (output, errors)
    assert output.startswith("preflight of 1 node, 1 rank\n")
    rows = dict(re.split("  +", line)[:2] for line in output.splitlines() if "  " in line)
    assert rows.keys() >= set(CHECKS) - {"manifests", "GPU health", "NVDEC"}
    assert rows["shared folder"] == "ok"
    assert "torch" in output
    assert max(map(len, output.splitlines())) <= 80
    assert list(tmp_path.iterdir()) == []


@pytest.mark.soak
def test_two_nodes_of_which_one_has_another_manifest(tmp_path: Path, motion_set: MotionSet) -> None:
    """Started as by SLURM, with names of nodes; the second node has other data at the same path."""
    own = shutil.copytree(motion_set.root, tmp_path / "own")
    (own / "train.arrow").write_bytes((own / "val.arrow").read_bytes())
    run, port = tmp_path / "run", str(find_port())
    processes = []
    for rank in (0, 1):
        # One path for both, as in a recipe, to different data.
        data = tmp_path / f"n{rank + 1}"
        data.mkdir()
        (data / "data").symlink_to(own if rank else motion_set.root)
        process = subprocess.Popen(
            [
                sys.executable, str(ROOT / "launch/doctor.py"), "--folder", str(run), "--recipe", str(SMALL),
                "--set", "data.train=data/train.arrow", "--set", "data.val=data/val.arrow",
            ],
            cwd=data,
            env={
                **os.environ, "COLUMNS": "80", "OMP_NUM_THREADS": "1", "SLURMD_NODENAME": f"n{rank + 1}",
                "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            },
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        processes.append(process)
    (output, errors), (silence, _) = (process.communicate(timeout=240) for process in processes)
    assert [process.returncode for process in processes] == [1, 0], (output, errors)
    assert silence == ""
    assert "preflight of 2 nodes, 2 ranks" in output
    written = json.loads((run / "slurm/preflight.json").read_text())
    assert written["failed"].keys() == {"n2"}
    (reason,) = written["failed"]["n2"]
    assert reason.startswith("manifests: data.train data/train.arrow: ")
    rows = dict(re.split("  +", line)[:2] for line in output.splitlines() if "  " in line)
    assert {name: rows[name] for name in ("manifests", "shared folder", "all-reduce")} == {
        "manifests": "failed", "shared folder": "ok", "all-reduce": "ok",
    }  # fmt: skip


def find_port() -> int:
    variables: dict[str, str] = {}
    find_environment("cpu", variables)
    return int(variables["MASTER_PORT"])


@pytest.mark.parametrize(
    ("arguments", "token"),
    [
        (("--recipe", "nowhere.yaml"), "nowhere.yaml"),
        (("--set", "model.frames=8"), "--set needs --recipe"),
        (("--patience", "0"), "--patience must be above 0"),
    ],
)
def test_a_mistake_is_reported_without_a_traceback(
    arguments: tuple[str, ...],
    token: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["doctor.py", *arguments])
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    try:
        with mock.patch.dict(os.environ):  # which it may add to
            code = launch.doctor.main()
    except SystemExit as error:  # of the parser
        code = error.code  # type: ignore[assignment]
    errors = capsys.readouterr().err
    assert code == 2
    assert token in errors
    assert "Traceback" not in errors
