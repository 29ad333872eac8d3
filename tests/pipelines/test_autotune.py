"""What `autotune` chooses where the options leave it open."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipelines.augment.params import TrainClipSpec
from pipelines.autotune import MOST_AHEAD, LoaderOptions, autotune
from pipelines.dali.external_source import TrainSource
from pipelines.dali.pipeline import LoaderResources
from pipelines.dali.sample_reader import Decoding, SampleReader
from pipelines.dataset.concat import Dataset
from pipelines.dataset.manifest import Manifest, write_manifest
from pipelines.sample_timing import SampleTiming, measure_samples
from pipelines.sampling.sampler import TrainSampler
from pipelines.synthetic.motion import CLASS_NAMES
from tests.conftest import MotionSet

CPU = torch.device("cpu")
CLIP = TrainClipSpec(4, 32)


def tune(
    manifest: Path, options: LoaderOptions, micro_batch: int = 8, clip: TrainClipSpec = CLIP
) -> tuple[Decoding, LoaderResources]:
    dataset = Dataset.open([manifest])
    sampler = TrainSampler(len(dataset), micro_batch, seed=3)

    def open_source(decoding: Decoding) -> TrainSource:
        return TrainSource(SampleReader(dataset, decoding), sampler, clip, micro_batch, 0, 1, 0)

    return autotune(open_source, options)


def test_a_cpu_gets_pyav_and_all_its_cores(motion_set: MotionSet) -> None:
    decoding, resources = tune(motion_set.train, LoaderOptions(CPU, cores=6))
    assert decoding == Decoding("pyav")
    assert resources.threads == 6
    assert 1 <= resources.workers <= 6  # these small clips need few
    assert "ms of CPU time" in resources.summary


def test_small_batches_have_more_prefetch_so_that_no_worker_waits(motion_set: MotionSet) -> None:
    def prefetch(micro_batch: int, workers: int) -> int:
        return tune(motion_set.train, LoaderOptions(CPU, workers=workers), micro_batch)[1].prefetch

    assert prefetch(micro_batch=8, workers=2) == 2
    assert prefetch(micro_batch=1, workers=4) == 9
    assert prefetch(micro_batch=1, workers=100) == MOST_AHEAD


def test_large_batches_have_no_second_one_ahead(motion_set: MotionSet) -> None:
    def prefetch(clip: TrainClipSpec, micro_batch: int) -> tuple[int, bool]:
        how = LoaderOptions(CPU, workers=2)
        resources = tune(motion_set.train, how, micro_batch, clip)[1]
        return resources.prefetch, "max_short_side" in resources.summary

    large_clips = TrainClipSpec(64, 512)  # float32: 192 MiB a clip, from frames of at most 1 MiB
    assert prefetch(large_clips, 8) == (1, False)
    assert prefetch(large_clips, 2)[0] > 1
    small_clips = TrainClipSpec(64, 16, crop_scale=(1, 1), crop_ratio=(1, 1))  # 0.2 MiB, from frames of 0.9
    assert prefetch(small_clips, 2048) == (1, True)
    assert prefetch(replace(small_clips, max_short_side=72), 2048) == (1, False)


def test_the_process_that_measures_samples_imports_neither_torch_nor_dali() -> None:
    """They would take seconds at the start of every run."""
    code = "import sys, pipelines.sample_timing; sys.exit(bool({'torch', 'nvidia.dali'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    assert measure_samples.__module__ == "pipelines.sample_timing"


def test_options_that_are_given_are_kept(motion_set: MotionSet) -> None:
    given = LoaderOptions(CPU, "pyav", workers=3, threads=5, prefetch=7, cores=2)
    _, resources = tune(motion_set.train, given)
    assert (resources.workers, resources.threads, resources.prefetch) == (3, 5, 7)


@pytest.mark.parametrize(
    ("device", "decoder", "splits"),
    [("cuda", "auto", True), ("cpu", "auto", False), ("cpu", "hybrid", True), ("cuda", "dali", False)],
)
def test_decoding_is_split_with_hybrid(device: str, decoder: str, splits: bool) -> None:
    assert LoaderOptions(torch.device(device), decoder).splits is splits


def test_hybrid_measures_its_share(motion_set: MotionSet) -> None:
    """The set's VP9 and MJPEG clips fit DALI's decoder on a CPU, so both sides have work."""
    decoding, resources = tune(motion_set.train, LoaderOptions(CPU, "hybrid", cores=2))
    assert decoding.name == "hybrid"
    assert 0 < decoding.graph_share < 1
    assert f"{decoding.graph_share:.0%} by dali" in resources.summary


def test_without_a_good_video_among_the_first_all_cores_are_used(
    motion_set: MotionSet, tmp_path: Path
) -> None:
    row = Manifest.open(motion_set.train).row(0)
    path = write_manifest(tmp_path / "bad.arrow", [replace(row, path="gone.mp4")], CLASS_NAMES).path
    assert tune(path, LoaderOptions(CPU, cores=6))[1].workers == 6


def test_hybrid_uses_pyav_alone_where_dali_fails_over_the_first_videos(vp9_set: Path) -> None:
    decoding, _ = tune(vp9_set, LoaderOptions(CPU, "hybrid", cores=2), micro_batch=12)
    assert decoding.graph_share == 0.0


def test_for_expensive_videos_there_is_advice() -> None:
    assert SampleTiming(read=0.1, decode=0.1, bytes=1.0).advice == ""
    expensive = SampleTiming(read=0.1, decode=2.0, bytes=1.0).advice
    assert "2.0 s of CPU time" in expensive and "-g 12" in expensive
