"""Parameter groups and the learning-rate schedule."""

import math

import pytest
import torch
from torch import nn

from trainer.engine.optim import learning_rate, parameter_groups


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.conv = nn.Conv3d(1, 2, 1, bias=False)
        self.scale = nn.Parameter(torch.zeros(()))
        self.shared = self.linear


def names(model: nn.Module, group: dict) -> set[str]:
    ids = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


def test_matrices_and_convolutions_decay_the_rest_does_not() -> None:
    model = Mixed()
    decayed, kept = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.05, 0.0)
    assert names(model, decayed) == {"linear.weight", "conv.weight"}
    assert names(model, kept) == {"linear.bias", "norm.weight", "norm.bias", "scale"}
    assert len(decayed["params"]) == 2  # a shared weight once


def test_frozen_parameters_are_left_out_and_no_group_is_empty() -> None:
    model = Mixed()
    model.linear.requires_grad_(False)
    model.conv.requires_grad_(False)
    (kept,) = parameter_groups(model, 0.05)
    assert names(model, kept) == {"norm.weight", "norm.bias", "scale"}


def rate(step: int, total: int = 100, warmup: int = 10) -> float:
    return learning_rate(step, total_steps=total, warmup_steps=warmup, peak=1.0, start=0.1, end=0.2)


def test_schedule_against_the_closed_form() -> None:
    assert rate(0) == 0.1
    assert rate(5) == pytest.approx(0.55)
    assert rate(10) == 1.0
    assert rate(55) == pytest.approx(0.6)
    assert rate(40) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 3)) / 2)
    assert rate(70) == pytest.approx(0.2 + 0.8 * (1 + math.cos(2 * math.pi / 3)) / 2)
    assert rate(100) == rate(1000) == 0.2


def test_schedule_rises_then_falls() -> None:
    rates = [rate(step) for step in range(101)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_schedule_without_warm_up_and_with_nothing_else() -> None:
    assert rate(0, warmup=0) == 1.0
    assert [rate(step, total=2, warmup=2) for step in range(3)] == pytest.approx([0.1, 0.55, 0.2])
