"""The description of a batch's clips agrees with the source."""

import numpy as np
import pytest

from pipelines.augment.params import TrainClipSpec
from pipelines.augment.rand_augment import OPERATION_FACTORIES
from pipelines.augment.roi import restrict_to_roi
from pipelines.batch_contents import describe_batch, format_changes, format_operation
from pipelines.dali.external_source import TrainSource
from pipelines.dali.sample_reader import Decoding, SampleReader
from pipelines.dataset.concat import Dataset
from pipelines.sampling.sampler import TrainSampler
from tests.conftest import MotionSet


def test_described_clips_are_those_of_the_source(motion_set: MotionSet) -> None:
    dataset = Dataset.open([motion_set.train])
    sampler = TrainSampler(len(dataset), 16, seed=3, repeats=2)
    clip = TrainClipSpec(4, 32, flip=0.5, color_jitter=0.2, rand_augment="rand-m7-n4-mstd0.5-inc1")
    source = TrainSource(SampleReader(dataset, Decoding("pyav")), sampler, clip, 16, 0, 1, first=5)
    planned = list(describe_batch(dataset, sampler, clip, 5))
    assert len(planned) == 16
    for number, each in enumerate(planned):
        request, slots, draws = source.sample(number // 2)
        draw = draws[number % 2]
        row = dataset.row(each.slot.sample)
        assert each.slot == slots[number % 2] and each.slot.sample == request.sample
        assert each.label == row.label and each.path == dataset.printable_path(request.sample)
        assert list(each.frames) == draw.indices.tolist()
        narrowed = restrict_to_roi(each.changes.operations, each.changes.crop, row.height, row.width, 4)
        np.testing.assert_array_equal(narrowed.parameters, draw.arrays["operations"])
    assert len({each.changes.crop for each in planned}) > 8
    words = [format_changes(each.changes) for each in planned]
    assert any("flip" in each for each in words) and not all("flip" in each for each in words)
    assert all(any(part.startswith("crop ") for part in each) for each in words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("AutoContrast", "auto contrast"),
        ("Rotate", "rotate by -15.0 degrees"),
        ("PosterizeIncreasing", "posterize to 2 bits"),
        ("SolarizeIncreasing", "solarize from 128"),
        ("SolarizeAdd", "solarize add 55"),
        ("ColorIncreasing", "color x 0.55"),
        ("SharpnessIncreasing", "sharpness x 0.55"),
        ("ShearX", "shear x by -0.15"),
        ("ShearY", "shear y by -0.15"),
        ("TranslateXRel", "translate x by +45.0 px"),
        ("TranslateYRel", "translate y by +22.5 px"),
    ],
)
def test_operations_as_text(name: str, words: str) -> None:
    assert format_operation(OPERATION_FACTORIES[name](0.5, -1.0, 100, 200)) == words
