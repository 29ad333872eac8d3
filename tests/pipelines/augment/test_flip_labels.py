"""Class names with mirrored directions."""

import pytest

from pipelines.augment.flip_labels import mirrored_classes
from pipelines.synthetic.motion import CLASS_NAMES


@pytest.mark.parametrize(
    "names",
    [
        ("move_left", "move_right"),
        ("Swiping Left", "Swiping Right"),
        ("turnLeft", "goRight"),
        ("Turning Hand Clockwise", "Turning Hand Counterclockwise"),
        ("spin-anti-clockwise", "spin-clockwise"),
        ("Pushing something from left to right", "Pulling something from right to left"),
        ("leftward", "rightwards"),
        ("punch (left-hand)", "punch (right hand)"),
    ],
)
def test_classes_that_a_flip_exchanges(names: tuple[str, ...]) -> None:
    assert mirrored_classes(("jump", *names, "run")) == names


@pytest.mark.parametrize(
    "names",
    [
        ("abseiling", "clean and jerk", "zumba"),
        ("doing it right", "doing it wrong"),
        ("eating leftovers", "civil rights", "putting upright", "bright light", "cleft lip"),
        ("from left to right", "from left to right again"),
        ("turning clockwise", "turning left"),
    ],
)
def test_classes_that_a_flip_does_not_affect(names: tuple[str, ...]) -> None:
    assert mirrored_classes(names) == ()


def test_the_embedded_data_set_has_mirrored_classes() -> None:
    assert mirrored_classes(CLASS_NAMES) == CLASS_NAMES[:2] + CLASS_NAMES[4:6]
