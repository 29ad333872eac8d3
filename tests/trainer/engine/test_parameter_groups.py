"""Parameter groups of AdamW: which tensors decay, and layer-wise decay."""

import math

import torch
from torch import nn

from models import create_model
from trainer.engine.optimizer import parameter_groups


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


def scales(layer_decay: float | None, **overrides: object) -> dict[str, float]:
    """Each trainable parameter's share of the learning rate, by name; each must be in one group."""
    model = create_model("tiny", form="temporal", frames=4, num_classes=4, **overrides)
    groups = parameter_groups(model, 0.05, layer_decay)
    found = [(name, group["lr_scale"]) for group in groups for name in names(model, group)]
    assert len(found) == len(dict(found)) == sum(p.requires_grad for p in model.parameters())
    return dict(found)


def test_the_backbone_learns_less_the_nearer_it_is_to_the_input() -> None:
    found = scales(0.5)
    for name, scale in found.items():
        part, _, rest = name.partition(".")
        if part == "blocks":
            assert scale == 0.5 ** (3 - int(rest[0])), name
        elif part in ("patch_embedding", "class_token", "position_embedding", "ln_pre"):
            assert scale == 0.5**4, name
        else:
            assert part in ("fusion", "balance", "head_norm", "head"), name
            assert scale == 1, name
    assert found["fusion.blocks.0.mlp.expand.weight"] == 1  # a block, but none of the backbone's
    assert {round(math.log2(1 / scale)) for scale in found.values()} == {0, 1, 2, 3, 4}


def test_groups_are_merged_and_in_a_fixed_order() -> None:
    model = create_model("tiny", form="temporal", frames=4, num_classes=4)
    found = [(group["lr_scale"], group["weight_decay"]) for group in parameter_groups(model, 0.05, 0.5)]
    assert found == [(0.5**power, decay) for power in (4, 3, 2, 1, 0) for decay in (0.05, 0.0)]
    plain = parameter_groups(model, 0.05)
    assert [(group["lr_scale"], group["weight_decay"]) for group in plain] == [(1, 0.05), (1, 0)]
    one = parameter_groups(model, 0.05, 1.0)
    assert [list(map(id, group["params"])) for group in one] == [
        list(map(id, group["params"])) for group in plain
    ]
    undecayed = parameter_groups(model, 0.0, 0.5)
    assert [group["lr_scale"] for group in undecayed] == [0.5**power for power in (4, 3, 2, 1, 0)]


def test_of_a_frozen_backbone_only_modules_outside_it_are_trained() -> None:
    model = {"local_mhra": 0, "frozen_backbone": True}
    assert set(scales(0.5, **model).values()) == {1.0}


def test_adamw_keeps_the_scales() -> None:
    model = create_model("tiny", form="scene", frames=4, num_classes=4)
    optimiser = torch.optim.AdamW(parameter_groups(model, 0.05, 0.75), lr=1e-3)
    assert [group["lr_scale"] for group in optimiser.param_groups][-1] == 1
    assert optimiser.state_dict()["param_groups"][0]["lr_scale"] == 0.75**4
