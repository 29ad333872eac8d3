"""Parity with the released implementation: logits, loss and every gradient of five small models.

`data/golden.json` holds what it computed; the weights are a function of each tensor's name and shape.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from models.weights.released import load_released, to_released

GOLDEN = json.loads((Path(__file__).parent / "data" / "golden.json").read_text())


def standard_normal(name, shape):
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, dtype=np.float32)


def golden_tensor(name, shape):
    if name.endswith("num_batches_tracked"):
        return torch.tensor(0)
    z = standard_normal(name, shape)
    if name.endswith("running_var"):
        z = 0.5 + abs(z)
    elif name.endswith("running_mean"):
        z = 0.1 * z
    elif name.endswith("balance"):
        pass
    elif name.endswith("temporal_cls_token"):
        z = 0.5 * z
    elif len(shape) >= 2:
        z = z / np.sqrt(np.prod(shape[1:]))
    elif name.endswith("weight"):
        z = 1 + 0.1 * z
    else:
        z = 0.05 * z
    return torch.from_numpy(np.asarray(z, dtype=np.float32))


def golden_model(entry):
    arguments = entry["official_arguments"]
    state = {name: golden_tensor(name, shape) for name, shape in entry["tensors"].items()}
    return load_released(
        state,
        frames=arguments["t_size"],
        heads=arguments["heads"],
        global_heads=arguments["n_head"],
        global_layers=arguments["return_list"],
    )


@pytest.fixture(params=GOLDEN, ids=list(GOLDEN))
def entry(request):
    return GOLDEN[request.param]


# Sums of fp32 in a GPU's order differ by more than those of two CPUs.
LOGITS = {"cpu": 1e-5, "cuda": 5e-5}
GRADIENTS = {"cpu": 1e-4, "cuda": 5e-4}


def test_logits_loss_and_every_gradient_match(entry, device):
    model = golden_model(entry).eval().to(device)
    # The reference gradients of the frozen model were taken with nothing frozen.
    model.requires_grad_(True)
    clips = torch.from_numpy(standard_normal("input", entry["input_shape"])).to(device)
    logits = model(clips)
    torch.testing.assert_close(logits.cpu(), torch.tensor(entry["logits"]), atol=LOGITS[device.type], rtol=0)

    labels = torch.arange(entry["batch"], device=device) % entry["official_arguments"]["num_classes"]
    loss = F.cross_entropy(logits, labels)
    assert loss.item() == pytest.approx(entry["loss"], abs=LOGITS[device.type])

    loss.backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad
    gradients = {name: to_released(model)[name] for name in entry["grad_l2"]}
    for name, expected in entry["grad_l2"].items():
        assert gradients[name].norm().item() == pytest.approx(
            expected, rel=GRADIENTS[device.type], abs=1e-7
        ), name
    parameters = {name for name in entry["tensors"] if "running" not in name and "num_batches" not in name}
    assert parameters == set(entry["grad_l2"])
