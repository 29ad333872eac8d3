"""What a file of weights says of preprocessing: written whole, read strictly."""

import json
from typing import Any

import numpy as np
import pytest

from pipelines.sampling.temporal import view_indices
from trainer.errors import RunError
from trainer.inference.preprocessing import FIXED, Preprocessing, read_preprocessing

WRITTEN = Preprocessing(8, 224, (0.45, 0.4, 0.5), (0.2, 0.2, 0.3), 4, 3)


def test_what_is_written_is_read_back() -> None:
    values = json.loads(json.dumps(WRITTEN.as_metadata()))
    assert read_preprocessing(values, 8, 224) == WRITTEN


def test_a_file_of_before_has_what_is_the_same_for_all() -> None:
    old = {"frames": 8, "resolution": 224, "sampling": "sparse", "mean": [0.4, 0, 1], "std": [1, 1, 0.5]}
    assert read_preprocessing(old, 8, 224) == Preprocessing(8, 224, (0.4, 0, 1), (1, 1, 0.5))


@pytest.mark.parametrize("frames", [1, 2, 7, 22, 300])
def test_the_formula_of_the_frames_is_what_is_done(frames: int) -> None:
    length, clips = 8, 4
    s = (frames - 1) / length
    by_formula = [
        [min(round(s * i) + int(s / (clips + 1) * (c + 1)), frames - 1) for i in range(length)]
        for c in range(clips)
    ]
    assert "min(round_half_to_even(s * i) + floor(s / (C + 1) * (c + 1)), n - 1)" in FIXED["frame_indices"]
    assert np.array_equal(view_indices(frames, length, clips), by_formula)


@pytest.mark.parametrize(
    ("change", "token"),
    [
        ({"frames": 16}, "frames 16"),
        ({"frames": True}, "frames"),
        ({"resolution": "224"}, "resolution"),
        ({"sampling": "dense"}, "dense"),
        ({"axes": "B T 3 H W"}, "axes"),
        ({"resize": {"short_side": "resolution"}}, "resize"),
        ({"mean": [0.4, 0.4]}, "mean"),
        ({"mean": "\x1b[31m"}, "mean"),
        ({"std": [0.2, 0, 0.2]}, "std"),
        ({"std": [0.2, float("nan"), 0.2]}, "std"),
        ({"std": [0.2, 10**400, 0.2]}, "std"),
        ({"evaluation_views": {"clips": 0, "crops": 1}}, "evaluation_views"),
        ({"evaluation_views": []}, "evaluation_views"),
        ({"gamma\x1b": 2}, "gamma"),
    ],
)
def test_what_cannot_be_followed_is_refused(change: dict[str, Any], token: str) -> None:
    with pytest.raises(RunError, match="preprocessing") as caught:
        read_preprocessing({**WRITTEN.as_metadata(), **change}, 8, 224)
    assert token in str(caught.value) and "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 1000
