"""The preflight: what it makes of numbers, of machines that differ, and of two ranks that are there."""

import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
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
    checkpoint_bytes,
    checkpoints_to_come,
    judge_gpu,
    judge_gpu_count,
    judge_gpu_memory,
    judge_memory,
    judge_space,
    product_is_right,
    read_decoding,
    read_smi,
    run_check,
)
from trainer.cluster.preflight.control_channel import (
    AllReduceTiming,
    ControlChannel,
    FolderView,
    answer_folder_check,
    bus_bandwidth,
    check_shared_folder,
    compare_clocks,
    judge_all_reduce,
    judge_clock,
    judge_folder_view,
    tell_time,
    time_all_reduce,
)
from trainer.cluster.preflight.report import CHECKS, as_table, lines, merge_results, summary, write_failures
from trainer.cluster.preflight.runner import differing, parse_result
from trainer.config.load import load_recipe
from trainer.distributed.environment import Environment, find_environment
from trainer.engine.memory_estimate import GIB
from trainer.errors import RunError
from trainer.system.timeouts import PREFIX, has_hung_threads

NA, OK, WARNING, FAILED = Status
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture
def alone() -> Environment:
    return find_environment("cpu", {})


# What one node makes of its own numbers


@pytest.mark.parametrize(
    ("seen", "needed", "ranks", "verdict"),
    [(8, 8, 8, OK), (7, 8, 8, FAILED), (0, 8, 8, FAILED), (0, 0, 2, NA), (8, 4, 4, WARNING), (8, 0, 1, OK)],
)
def test_as_many_gpus_as_the_node_has_ranks(seen: int, needed: int, ranks: int, verdict: Status) -> None:
    finding = judge_gpu_count(seen, needed, ranks)
    assert finding.verdict is verdict
    assert str(seen) in finding.text or verdict is NA


def _seen(*gpus: str, told: int = 0) -> dict[str, Any]:
    return {"gpus": gpus, "told": told}


@pytest.mark.parametrize(
    ("reports", "given", "verdicts"),
    [
        ([_seen(), _seen(), _seen(), _seen()], {}, [NA, NA]),
        ([_seen("a"), _seen("b"), _seen("c"), _seen("d")], {}, [OK, OK]),  # each sees its own
        ([_seen("a", "b"), _seen("a", "b"), _seen("c", "d"), _seen("c", "d")], {}, [OK, OK]),
        ([_seen("a"), _seen("a"), _seen("c", "d"), _seen("c", "d")], {}, [FAILED, OK]),
        ([_seen("a", "b"), _seen("a", "b"), _seen(), _seen()], {}, [OK, FAILED]),
        ([_seen("a", "b"), _seen("a", "b"), _seen(), _seen()], {"device": "cpu"}, [OK, NA]),
        ([_seen(told=2), _seen(), _seen(told=2), _seen()], {}, [FAILED, FAILED]),  # torch sees none
        ([_seen(), _seen(), _seen(), _seen()], {"device": "cuda"}, [FAILED, FAILED]),
        (
            [_seen("a", "b"), _seen("a", "b"), _seen("c", "d"), _seen("c", "d")],
            {"asked": 3},
            [FAILED, FAILED],
        ),
        ([_seen("a", "b", "c")], {"alone": True}, [OK]),
        ([_seen(told=1)], {"alone": True}, [FAILED]),
    ],
)
def test_gpus_of_a_node_are_those_its_ranks_see(
    reports: list[dict[str, Any]], given: dict[str, Any], verdicts: list[Status]
) -> None:
    nodes = {rank: f"n{rank // 2 + 1}" for rank in range(len(reports))}
    how = {"device": "auto", "alone": False, "asked": None, **given}
    found = runner.count_gpus(nodes, dict(enumerate(reports)), **how)
    assert [finding.verdict for _, finding in found] == verdicts


@pytest.mark.parametrize(
    ("told", "right", "verdict", "words"),
    [
        ({}, True, OK, "no nvidia-smi"),
        ({"clocks_event_reasons.active": "0x0000000000000005"}, True, OK, "products right"),
        ({}, False, FAILED, "products differ"),
        ({"ecc.errors.uncorrected.volatile.total": "0"}, True, OK, ""),
        ({"ecc.errors.uncorrected.volatile.total": "[N/A]"}, True, OK, ""),
        ({"ecc.errors.uncorrected.volatile.total": "3"}, True, FAILED, "3 uncorrected memory errors"),
        ({"retired_pages.pending": "Yes"}, True, FAILED, "waits for a reset"),
        ({"remapped_rows.pending": "1"}, True, FAILED, "waits for a reset"),
        ({"remapped_rows.failure": "1"}, True, FAILED, "no spare memory"),
        ({"clocks_throttle_reasons.active": "0x0000000000000040"}, True, WARNING, "heat"),
        ({"clocks_event_reasons.active": "0x88"}, True, WARNING, "hardware slowdown, power brake"),
    ],
)
def test_what_a_gpu_s_driver_tells(told: dict[str, str], right: bool, verdict: Status, words: str) -> None:
    finding = judge_gpu(3, told, right=right)
    assert finding.verdict is verdict
    assert words in finding.text
    assert verdict is OK or (finding.text.startswith("GPU 3: ") and finding.advice)


def test_the_line_of_one_gpu_is_read() -> None:
    said = "GPU-aa, 550.54.15, 0\nGPU-bb, 550.54.15, 2\n"
    assert read_smi(said, ("driver_version", "errors"), "GPU-bb") == {
        "driver_version": "550.54.15",
        "errors": "2",
    }
    assert read_smi(said, ("driver_version", "errors"), "GPU-cc") == {}


def test_a_field_that_nvidia_smi_does_not_know_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        'case "$1" in *new*) echo "Field is not a valid field to query."; exit 2;; esac\n'
        'echo "GPU-aa, 550.54.15"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert checks.smi("gpu", ("driver_version",), "GPU-aa") == {"driver_version": "550.54.15"}
    assert checks.smi("gpu", ("new",), "GPU-aa") == {}
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert checks.smi("gpu", ("driver_version",), "GPU-aa") == {}


def test_a_gpu_that_others_use() -> None:
    assert judge_gpu_memory(0, 79 * GIB, 80 * GIB).verdict is OK
    used = judge_gpu_memory(0, 60 * GIB, 80 * GIB)
    assert used.verdict is WARNING
    assert "20.0 GiB of 80.0 GiB taken" in used.text


def test_decoding_counts_frames_and_names_what_went_wrong() -> None:
    assert read_decoding(1, 0, json.dumps({"frames": FRAMES}), "").verdict is OK
    for finding, words in (
        (read_decoding(1, 0, '{"frames": 15}', ""), "15 of 16"),
        (read_decoding(1, 1, "", "Traceback\nno decoder"), "GPU 1: no decoder"),
        (read_decoding(1, -11, "", ""), "signal 11"),
    ):
        assert finding.verdict is FAILED
        assert words in finding.text


def test_a_clip_made_here_is_decoded_with_all_its_frames() -> None:
    assert decode_test_video(CPU, FRAMES) == [FRAMES, 128, 128, 3]


def test_a_decoder_that_gives_other_frames_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its output has as many frames as were asked for, whatever is in them."""
    right = pipelines.decode.selftest.check_encoded

    def one_later(*arguments: object) -> object:
        encoded = right(*arguments)  # type: ignore[arg-type]
        return replace(encoded, indices=np.minimum(encoded.indices + 1, FRAMES - 1))

    monkeypatch.setattr(pipelines.decode.selftest, "check_encoded", one_later)
    with pytest.raises(RuntimeError, match="15 of 16 frames are not those"):
        decode_test_video(CPU, FRAMES)


def test_products_are_compared_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    assert product_is_right(CPU)
    right = torch.Tensor.__matmul__

    def wrong_in_bf16(left: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        product = right(left, other)
        if left.dtype == torch.bfloat16:
            product[7, 7] += 1
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", wrong_in_bf16)
    assert not product_is_right(CPU)


@pytest.mark.parametrize(("free", "verdict"), [(16, OK), (15, WARNING), (7, FAILED)])
def test_memory_is_for_all_ranks_of_the_node(free: int, verdict: Status) -> None:
    finding = judge_memory(free * GIB, 8)
    assert finding.verdict is verdict
    assert finding.text == f"{free}.0 GiB free for 8 ranks"


def test_a_disk_too_full_for_one_checkpoint_fails_and_for_all_warns() -> None:
    def verdict(free: int) -> Status:
        return judge_space("disk", free, least=3, wanted=9, advice="").verdict

    assert [verdict(free) for free in (2, 3, 8, 9)] == [FAILED, WARNING, WARNING, OK]


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
        findings, _ = check_node(alone, CPU, tmp_path / "not/there/yet", load_recipe(SMALL))
        (finding,) = (finding for finding in findings if finding.check == "disk")
        return finding

    assert disk(free + GIB).verdict is FAILED
    assert disk(free // 3).verdict is WARNING
    assert disk(free // 3).advice.startswith("5 checkpoints of ")
    assert disk(free // 10).verdict is OK


def test_manifests_are_looked_for(tmp_path: Path, motion_set: MotionSet, alone: Environment) -> None:
    def manifests(*given: str) -> tuple[CheckResult, dict[str, str]]:
        findings, facts = check_node(alone, CPU, tmp_path, load_recipe(SMALL, given))
        (finding,) = (finding for finding in findings if finding.check == "manifests")
        return finding, facts["manifests"]

    here = (f"data.train={motion_set.train}", f"data.val={motion_set.val}")
    finding, prints = manifests(*here)
    assert finding.verdict is OK
    assert len(prints) == 2
    assert all(len(value) == 12 for value in prints.values())
    finding, _ = manifests(here[0], f"data.val={tmp_path}/none.arrow", "data.embedded=null")
    assert finding.verdict is FAILED
    assert f"{tmp_path}/none.arrow is not there" in finding.text
    damaged = tmp_path / "damaged.arrow"
    damaged.write_bytes(b"no manifest")
    broken = check_node(alone, CPU, tmp_path, load_recipe(SMALL, [here[0], f"data.val={damaged}"]))[0]
    (finding,) = (finding for finding in broken if finding.check == "manifests")
    assert finding.verdict is FAILED
    assert "is not a manifest" in finding.text


def test_a_check_that_breaks_or_hangs_is_a_failed_check() -> None:
    (broken,) = run_check("disk", lambda: [1 / 0])  # type: ignore[list-item]
    assert broken.verdict is FAILED
    assert "ZeroDivisionError" in broken.text
    (refused,) = run_check("memory", _refuse)
    assert (refused.verdict, refused.text) == (FAILED, "no /proc here")
    assert not has_hung_threads()
    gate = threading.Event()
    (late,) = run_check("memory", lambda: [gate.wait()], 0.1)  # type: ignore[list-item]
    assert late.verdict is FAILED
    assert "no end within 0.1 s" in late.text
    assert has_hung_threads()
    gate.set()
    for thread in threading.enumerate():
        if thread.name.startswith(PREFIX):
            thread.join()
    assert not has_hung_threads()


def _refuse() -> list[CheckResult]:
    raise RunError("no /proc here")


# What is judged of what lies between nodes


@pytest.mark.parametrize(
    ("error", "offset", "verdict"),
    [
        (0.001, 0.3, OK),
        (0.001, -1.5, WARNING),
        (0.001, 59.0, WARNING),
        (0.001, -61.0, FAILED),
        (2.0, 0.0, WARNING),  # cannot be told from a second
        (5.0, 61.0, WARNING),
    ],
)
def test_clocks_are_judged_with_their_error(error: float, offset: float, verdict: Status) -> None:
    finding = judge_clock(error, offset)
    assert finding.verdict is verdict
    assert ("ahead" if offset > 0 else "behind") in finding.text
    assert "±" in finding.text


def test_what_a_node_sees_of_the_folder_is_held_to_the_bytes() -> None:
    def judged(sight: FolderView, came_back: str) -> CheckResult:
        return judge_folder_view("ours", sight, came_back, alone=False)

    assert judged(FolderView("ours", "", "its", 0.2), "its").verdict is OK
    for sight, came_back, words in (
        (FolderView("another", "", "its", 0.2), "its", "other bytes than rank 0 wrote"),
        (FolderView("", "it is not there", "", 9.0), "", "it is not there"),
        (FolderView("ours", "", "its", 0.2), "", "does not see what it wrote"),
        (FolderView("ours", "", "its", 0.2), "another", "rank 0 sees other bytes"),
    ):
        finding = judged(sight, came_back)
        assert finding.verdict is FAILED
        assert words in finding.text


def test_the_slowest_rank_s_time_counts_and_wrong_sums_fail() -> None:
    mib = 2**20
    sums = {
        rank: [AllReduceTiming(mib, 0.001, 0), AllReduceTiming(64 * mib, 0.01 * (rank + 1), 0)]
        for rank in range(4)
    }
    assert bus_bandwidth(sums[3][1], 4) == pytest.approx(1.5 * 64 * mib / 0.04 / 1e9)
    found = judge_all_reduce(sums, 4, None)
    assert {finding.verdict for finding in found.values()} == {OK}
    assert {finding.text for finding in found.values()} == {"1 MiB in 1.00 ms; 64 MiB at 2.52 GB/s of bus"}
    assert {finding.verdict for finding in judge_all_reduce(sums, 4, 2.5).values()} == {OK}
    assert {finding.verdict for finding in judge_all_reduce(sums, 4, 2.6).values()} == {FAILED}
    sums[2][1] = AllReduceTiming(64 * mib, 0.01, 17)
    found = judge_all_reduce(sums, 4, None)
    assert [rank for rank, finding in found.items() if finding.verdict is FAILED] == [2]
    assert "17 elements" in found[2].text


def test_nodes_that_differ_from_most_are_named() -> None:
    usual = {"torch": "2.9", "Python": "3.11"}
    facts = {"n1": usual, "n2": {**usual, "torch": "2.8"}, "n3": usual, "n4": {"Python": "3.11"}}
    found = dict(differing("versions", facts))
    assert found.keys() == {"n2", "n4"}
    assert found["n2"].text == "torch: 2.8, elsewhere 2.9"
    assert found["n4"].text == "torch: missing, elsewhere 2.9"
    assert {finding.verdict for finding in found.values()} == {FAILED}
    assert next(differing("driver", {"n1": {"driver": "550"}, "n2": {"driver": "535"}}))[0] == "n2"
    assert not list(differing("versions", {"n1": usual, "n2": usual}))


# The table


def test_ranks_of_a_node_count_as_its_worst() -> None:
    table = merge_results(
        [
            ("n1", CheckResult("GPU health", OK, "fine")),
            ("n1", CheckResult("GPU health", FAILED, "GPU 3: broken", "reset")),
            ("n1", CheckResult("GPU health", FAILED, "GPU 5: broken", "reset")),
            ("n1", CheckResult("GPU health", WARNING, "GPU 6: hot")),
            ("n2", CheckResult("GPU memory", OK, "79 free", value=79)),
            ("n2", CheckResult("GPU memory", OK, "78 free", value=78)),
        ]
    )
    assert list(table) == ["GPU health", "GPU memory"]
    assert table["GPU health"]["n1"].text == "GPU 3: broken; GPU 5: broken"
    assert table["GPU memory"]["n2"].text == "78 free"


def test_a_thousand_nodes_take_a_few_lines() -> None:
    nodes = {
        f"n{number}": CheckResult("disk", OK, f"{number} free", value=number) for number in range(100, 1100)
    }
    nodes["n200"] = nodes["n300"] = CheckResult("disk", FAILED, "1 free", "clear it")
    nodes["n400"] = CheckResult("disk", WARNING, "5 free", "clear some")
    assert lines(nodes) == [
        "n200, n300: 1 free",
        "-> clear it",
        "n400: 5 free",
        "-> clear some",
        "997 nodes: ok, at worst 100 free (n100)",
    ]
    alike = {node: CheckResult("disk", FAILED, "1 free", "clear it") for node in nodes}
    assert lines(alike) == ["n100, n101, n102, n103 and 996 more: 1 free", "-> clear it"]
    different = {node: CheckResult("disk", FAILED, f"{node} is full", "clear it") for node in nodes}
    shown = lines(different)
    assert len(shown) == 7
    assert shown[-2:] == ["-> clear it", "and 995 more nodes"]
    assert lines({"n1": CheckResult("disk", OK, "5 free")}) == ["5 free"]


def test_the_table_fits_80_columns_and_has_no_colours_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    found = [("n1", CheckResult(check, OK, "well [not a style] " * 10)) for check in CHECKS]
    table = as_table(merge_results([*found, ("n2", CheckResult("disk", FAILED, "full"))]))
    Console(width=80).print(table)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "\x1b" not in shown
    assert "[not a" in shown
    assert all(f"\n{check}" in shown for check in CHECKS)


def test_failed_nodes_are_written_for_the_script_and_forgotten_when_all_is_well(tmp_path: Path) -> None:
    bad = CheckResult("disk", FAILED, "full")
    table = merge_results(
        [("n1", CheckResult("disk", OK, "")), ("n2", bad), ("n2", CheckResult("clock", WARNING, "off"))]
    )
    file = tmp_path / "slurm/preflight.json"
    assert write_failures(tmp_path, table) == file
    assert json.loads(file.read_text()) == {"failed": {"n2": ["disk: full"]}, "everywhere": []}
    assert summary(table, file) == f"1 failure, 1 warning; see {file}"
    # To leave out all nodes would leave none: it is not their fault.
    write_failures(tmp_path, merge_results([("n1", bad), ("n2", bad)]))
    assert json.loads(file.read_text()) == {"failed": {}, "everywhere": ["disk: full"]}
    well = merge_results([("n1", CheckResult("disk", WARNING, "")), ("n2", CheckResult("disk", OK, ""))])
    assert write_failures(tmp_path, well) is None
    assert not file.exists()
    assert summary(well, None) == "nothing failed, 1 warning"


def test_a_finding_survives_its_way_to_rank_0() -> None:
    finding = CheckResult("disk", WARNING, "5 free", "clear some", 5.0)
    assert parse_result(json.loads(json.dumps(vars(finding)))) == finding


# Two ranks


def _share(folders: tuple[Path, Path], patience: float) -> dict[int, CheckResult]:
    exchange = _exchange("share")
    if exchange.rank == 0:
        return check_shared_folder(exchange, folders[0], [1], patience)
    answer_folder_check(exchange, exchange.hear("folder", 60), folders[1], patience)
    return {}


def test_a_folder_that_both_see(pair: Ranks, tmp_path: Path) -> None:
    run = tmp_path / "runs/new"
    found = pair.run(_share, (run, run), 20.0)[0]
    assert [found[rank].verdict for rank in (0, 1)] == [OK, OK]
    assert list(tmp_path.iterdir()) == []  # as it was
    (run / "slurm").mkdir(parents=True)
    (run / "slurm/turns.jsonl").write_text("kept")
    pair.run(_share, (run, run), 20.0)
    assert [path.name for path in run.rglob("*")] == ["slurm", "turns.jsonl"]


def test_a_folder_that_one_node_does_not_see(pair: Ranks, tmp_path: Path) -> None:
    found = pair.run(_share, (tmp_path / "here", tmp_path / "there"), 0.5)[0]
    assert found[0].verdict is OK
    assert found[1].verdict is FAILED
    assert "does not hold what rank 0 wrote" in found[1].text
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(pair: Ranks, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    found = pair.run(_share, (file / "run", file / "run"), 0.5)[0]
    assert found[0].verdict is FAILED
    assert "cannot write in" in found[0].text


def _clocks(ahead: float) -> dict[int, CheckResult]:
    exchange = _exchange("clocks")
    if exchange.rank == 0:
        return compare_clocks(exchange, [1], 60)
    tell_time(exchange, 60, lambda: time.time() + ahead)
    return {}


@pytest.mark.parametrize(("ahead", "verdict"), [(0.0, OK), (5.0, WARNING), (-90.0, FAILED)])
def test_a_clock_that_is_off(pair: Ranks, ahead: float, verdict: Status) -> None:
    finding = pair.run(_clocks, ahead)[0][1]
    assert finding.verdict is verdict
    if ahead:
        assert finding.text.startswith(f"{abs(ahead):.1f} s {'ahead' if ahead > 0 else 'behind'}")


def _sum(mistaken: bool) -> list[AllReduceTiming]:
    rank = dist.get_rank()
    # A rank that adds another part than its own stands for a link that changes it.
    return time_all_reduce(CPU, 2, 5 if mistaken and rank == 1 else rank)


def test_sums_over_ranks_are_exact(pair: Ranks) -> None:
    for sums in pair.run(_sum, False):
        assert [one.wrong for one in sums] == [0, 0]
        assert all(one.seconds > 0 for one in sums)
    for sums in pair.run(_sum, True):
        assert [one.wrong for one in sums] == [one.bytes // 4 for one in sums]


def _collect() -> Any:
    exchange = _exchange("collect")
    if exchange.rank == 1:
        exchange.give("word", {"a": 1})
        return exchange.hear("told", 60)
    exchange.tell("told", "well")
    came = exchange.collect("word", [1], 60), exchange.collect("word", [0, 1], 0.2)
    try:
        exchange.hear("never told", 0.2)
    except TimeoutError as error:
        return *came, str(error)


def test_who_does_not_answer_is_left_out(pair: Ranks) -> None:
    first, second, problem = pair.run(_collect)[0]
    assert first == second == {1: {"a": 1}}
    assert "never told" in problem


def _examine(folder: Path) -> tuple[int, str]:
    """A preflight of which rank 1 takes longer to look at itself than rank 0 waits; its code and output."""
    place = find_environment("cpu")
    place = replace(place, local_rank=0, node=f"n{place.rank + 1}")
    examination = runner.Preflight(REQUEST, None, "", place, CPU, folder)
    examination.exchange = _exchange("examine")
    gone = threading.Event()
    patience = mock.patch.object(runner, "REPORTS", 0.5)
    hanging = mock.patch.object(
        runner, "look", lambda *_: (gone.wait(3.0), [CheckResult("disk", OK, "")], {})[1:]
    )
    with patience, hanging if place.rank else nullcontext(), redirect_stdout(io.StringIO()) as output:
        return examination.run(), output.getvalue()


def test_a_node_that_does_not_report_is_named_and_holds_nobody_up(pair: Ranks, tmp_path: Path) -> None:
    (code, output), (late, _) = pair.run(_examine, tmp_path)
    assert (code, late) == (1, 1)
    assert "n2: rank 1: no answer" in output
    assert "not tried: some rank did not answer" in output
    written = json.loads((tmp_path / "slurm/preflight.json").read_text())
    assert written == {"failed": {"n2": ["ranks: rank 1: no answer"]}, "everywhere": []}


_turn = 0


def _exchange(name: str) -> ControlChannel:
    """Under keys of its own: the ranks stay between tests."""
    global _turn
    _turn += 1
    store = dist.distributed_c10d._get_default_store()
    return ControlChannel(dist.get_rank(), 2, dist.PrefixStore(f"{name}-{_turn}", store))


# The command

REQUEST = runner.PreflightRequest(
    folder=None, recipe=None, overrides=(), gpus_per_node=None, min_bandwidth=None, patience=5.0
)


def test_ranks_that_do_not_meet_are_a_failure(
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
    rows = {line[:16].strip(): line[16:] for line in output.splitlines()}
    assert rows.keys() >= set(CHECKS)
    assert rows["shared folder"].split()[0] == "ok"
    assert "torch" in rows["versions"]
    assert max(map(len, output.splitlines())) <= 80
    assert list(tmp_path.iterdir()) == []


@pytest.mark.soak
def test_two_nodes_of_which_one_lacks_what_the_recipe_names(tmp_path: Path, motion_set: MotionSet) -> None:
    """Started as SLURM does, with names of nodes; the second node's data lie elsewhere, and are others."""
    own = shutil.copytree(motion_set.root, tmp_path / "own")
    (own / "train.arrow").write_bytes((own / "val.arrow").read_bytes())
    run, port = tmp_path / "run", str(find_port())
    processes = []
    for rank in (0, 1):
        # One path for both, as in a recipe; what lies there differs.
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
    rows = {line[:16].strip(): line[16:].split()[0] for line in output.splitlines() if len(line) > 16}
    assert {name: rows[name] for name in ("manifests", "shared folder", "clock", "all-reduce")} == {
        "manifests": "failed", "shared folder": "ok", "clock": "ok", "all-reduce": "ok",
    }  # fmt: skip


def find_port() -> int:
    variables: dict[str, str] = {}
    find_environment("cpu", variables)
    return int(variables["MASTER_PORT"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--recipe", "nowhere.yaml"), "nowhere.yaml"),
        (("--set", "model.frames=8"), "--set needs --recipe"),
        (("--patience", "0"), "--patience must be above 0"),
    ],
)
def test_a_mistake_is_told_without_a_traceback(
    arguments: tuple[str, ...],
    words: str,
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
    assert words in errors
    assert "Traceback" not in errors
