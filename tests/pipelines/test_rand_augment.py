import numpy as np
import pytest

from pipelines import DataError
from pipelines.rand_augment import Operation, Policy, draw, parse


def test_parse() -> None:
    assert parse("rand-m7-n4-mstd0.5-inc1") == Policy(7.0, 4, 0.5, 0.5)
    assert parse("rand-m9-n2-inc1-p0.8") == Policy(9.0, 2, 0.0, 0.8)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("augmix-m3", "rand-"),
        ("rand-m7-n4", "inc1"),
        ("rand-m11-n4-inc1", "m must lie in 0..10"),
        ("rand-m7-x4-inc1", "'x4'"),
        ("rand-m7-n1.5-inc1", "whole"),
    ],
)
def test_a_wrong_policy_is_named(text: str, named: str) -> None:
    with pytest.raises(DataError, match=named):
        parse(text)


def test_each_of_fifteen_operations_fires_half_the_time() -> None:
    policy, rng = parse("rand-m7-n4-mstd0.5-inc1"), np.random.default_rng(0)
    codes = np.concatenate([draw(policy, rng, 240, 320)[0] for _ in range(5000)])
    shares = np.bincount(codes, minlength=len(Operation)) / len(codes)
    # three warps and two translations share a code each; 20,000 draws: a standard deviation under 0.0036
    expected = dict.fromkeys(Operation, 1 / 30)
    expected |= {Operation.NOTHING: 1 / 2, Operation.WARP: 3 / 30, Operation.TRANSLATE: 2 / 30}
    for operation, share in expected.items():
        assert abs(shares[operation] - share) < 0.011, operation


def test_arguments_at_full_magnitude() -> None:
    policy, rng = parse("rand-m10-n16-inc1-p1"), np.random.default_rng(1)
    seen: dict[Operation, set[float]] = {}
    for _ in range(300):
        for code, arguments in zip(*draw(policy, rng, 200, 300), strict=True):
            seen.setdefault(Operation(code), set()).add(round(float(arguments[0]), 4))
    assert seen[Operation.POSTERIZE] == {0.0}  # no bit left
    assert seen[Operation.SOLARIZE] == {0.0}
    assert seen[Operation.SOLARIZE_ADD] == {110.0}
    assert seen[Operation.COLOR] == {0.1, 1.9}
    assert seen[Operation.TRANSLATE] == {-90.0, 0.0, 90.0}  # 0.45 of the height, or none along y
    assert seen[Operation.WARP] == {1.0, round(float(np.cos(np.pi / 6)), 4)}
