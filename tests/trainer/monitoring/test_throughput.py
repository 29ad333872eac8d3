"""Rates, totals and peaks, by a clock that the tests turn."""

from collections.abc import Callable

import pytest
import torch

from trainer.monitoring.throughput import RunTotals, ThroughputMeter, memory_peak, peak_flops

CPU = torch.device("cpu")


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def meter(clock: Clock) -> ThroughputMeter:
    return ThroughputMeter(device=CPU, window=3, clock=clock)


@pytest.fixture
def step(meter: ThroughputMeter, clock: Clock) -> Callable[..., None]:
    def run(clips: int, *, waited: float, trained: float) -> None:
        with meter.step(clips):
            for _ in range(2):  # two micro-batches
                with meter.time("waiting"):
                    clock.now += waited / 2
                clock.now += trained / 2

    return run


def test_nothing_measured_is_no_error(meter: ThroughputMeter) -> None:
    rates = meter.rates()
    assert (rates.clips_per_second, rates.data_wait_share, rates.seconds_per_step) == (0, 0, 0)
    assert rates.mfu is None
    assert meter.time_left(10) == 0


def test_rates_are_means_over_the_window(meter: ThroughputMeter, step: Callable[..., None]) -> None:
    step(32, waited=100.0, trained=100.0)
    for _ in range(3):
        step(32, waited=0.5, trained=1.5)
    rates = meter.rates()
    assert rates.clips_per_second == 16
    assert rates.data_wait_share == 0.25
    assert rates.seconds_per_step == 2
    assert meter.time_left(50) == 100


def test_saving_and_evaluating_do_not_slow_the_rates(
    meter: ThroughputMeter, clock: Clock, step: Callable[..., None]
) -> None:
    step(8, waited=0.0, trained=1.0)
    with meter.time("saving"):
        clock.now += 30
    with meter.time("evaluating"):
        clock.now += 60
    step(8, waited=0.0, trained=1.0)
    assert meter.rates().clips_per_second == 8
    assert (meter.spent.saving, meter.spent.evaluating, meter.spent.seconds) == (30, 60, 92)


def test_totals_go_on_after_a_restart(
    clock: Clock, meter: ThroughputMeter, step: Callable[..., None]
) -> None:
    step(32, waited=1.0, trained=3.0)
    saved = meter.totals()
    spent = {"training": 3, "waiting": 1, "saving": 0, "evaluating": 0, "lost": 0}
    assert saved == {"steps": 1, "clips": 32, **spent, "starts": 1, "device_seconds": 4}
    later = ThroughputMeter(device=CPU, clock=clock)
    later.restore(saved)
    with later.step(32):
        clock.now += 4
    assert later.spent == RunTotals(steps=2, clips=64, training=7, waiting=1, starts=2)
    assert later.spent.clips_per_second == 8
    assert later.spent.data_wait_share == 0.125
    assert saved["steps"] == 1


def test_what_restarts_cost_is_added_up(
    clock: Clock, meter: ThroughputMeter, step: Callable[..., None]
) -> None:
    meter.record_startup(20)  # the first start-up is no loss
    step(8, waited=0.0, trained=60.0)
    assert (meter.spent.lost, meter.spent.seconds) == (0, 60)
    again = ThroughputMeter(device=CPU, clock=clock)
    again.restore(meter.totals(), done_again=15)
    again.record_startup(5)
    assert (again.spent.lost, again.spent.starts, again.spent.seconds) == (20, 2, 80)
    third = ThroughputMeter(device=CPU, clock=clock)
    third.restore(again.totals(), done_again=-3600)
    third.record_startup(20)
    assert (third.spent.lost, third.spent.starts) == (40, 3)
    assert third.spent.clips_per_second == 8 / 60  # rates are those of the training
    assert third.spent.time_breakdown == (
        "0:01:40: training 60 %, waiting 0 %, saving 0 %, evaluating 0 %, lost to 2 restarts 40 %"
    )


def test_device_seconds_are_counted_by_the_ranks_of_each_start(clock: Clock) -> None:
    first = ThroughputMeter(device=CPU, clock=clock, world_size=4)
    with first.time("saving"):
        clock.now += 10
    assert first.device_seconds == 40
    later = ThroughputMeter(device=CPU, clock=clock, world_size=2)
    later.restore(first.totals(), done_again=3)
    later.record_startup(2)
    with later.time("evaluating"):
        clock.now += 5
    assert later.device_seconds == 40 + 2 * (3 + 2 + 5)
    again = ThroughputMeter(device=CPU, clock=clock, world_size=2)
    again.restore(first.totals(), done_again=3, device_done_again=12)
    again.record_startup(2)
    assert again.device_seconds == 40 + 4 * 3 + 2 * 2
    old = {name: value for name, value in first.totals().items() if name != "device_seconds"}
    later.restore(old)
    assert later.device_seconds == 20  # as if all of it had been on the ranks of now


def test_totals_of_other_versions_are_taken(clock: Clock, meter: ThroughputMeter) -> None:
    old = {"steps": 10, "clips": 320, "training": 30.0, "waiting": 1.0, "saving": 0.5, "evaluating": 2.0}
    meter.restore({**old, "dreaming": 3.0})
    assert meter.spent == RunTotals(10, 320, 30.0, 1.0, 0.5, 2.0, lost=0.0, starts=2)
    assert "restart 0 %" in meter.spent.time_breakdown


def test_setting_the_time_of_day_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 0.0)
    plain = ThroughputMeter(device=CPU)
    with plain.time("saving"), plain.step(1):
        monkeypatch.setattr("time.time", lambda: 1e9)
    assert 0 < plain.spent.saving < 60 and 0 < plain.spent.training < 60


def test_utilisation_of_known_gpus_only(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "NVIDIA H100 80GB HBM3"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 123)

    def mfu(**changes: object) -> float | None:
        measured = ThroughputMeter(device=torch.device("cuda", 0), clock=clock, **changes)  # type: ignore[arg-type]
        with measured.step(989):
            clock.now += 2
        assert measured.rates().memory_peak == 123
        return measured.rates().mfu

    assert mfu(flops_per_clip=1e12) == pytest.approx(0.5)
    assert mfu(flops_per_clip=1e12, world_size=2) == pytest.approx(0.25)
    assert mfu() is None
    name = "NVIDIA Something New"
    assert mfu(flops_per_clip=1e12) is None


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA L4", 121),
        ("Tesla V100-SXM2-32GB", 125),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("AMD Instinct MI300X", None),
        (None, None),
    ],
)
def test_the_peak_is_that_of_the_whole_name(name: str | None, tera: float | None) -> None:
    assert peak_flops(name) == (None if tera is None else tera * 1e12)


def test_the_resident_set_is_in_bytes() -> None:
    before = memory_peak(CPU)
    ballast = bytearray(before + 50_000_000)
    ballast[::4096] = b"x" * len(ballast[::4096])
    assert memory_peak(CPU) >= before + 50_000_000
    assert memory_peak(CPU) < 4 * before + 400_000_000
