"""The model and its masks on a GPU against the CPU."""

import pytest
import torch
import torch.nn.functional as F

from models import create_model
from models.drop import Dropout, DropPath, mask_streams

pytestmark = pytest.mark.gpu

RATES = {"drop_path": 0.2, "global_drop_path": 0.2, "head_dropout": 0.3}
# Without TF32 a product has 24 bits on both; sums are taken in another order. With TF32 (11 bits) the errors
# are about 1e-3.
RELATIVE = 1e-4


def gradients_and_logits(form: str, device: torch.device) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = create_model("tiny", form=form, frames=4, num_classes=10, resolution=32, **RATES)
    with torch.no_grad():  # zero-initialised tensors would hide later ones
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    clips, keys = torch.randn(4, 3, 4, 32, 32), torch.arange(4)
    model.to(device).train()
    logits = model(clips.to(device), keys.to(device))
    F.cross_entropy(logits, keys.to(device)).backward()
    return logits.detach().cpu(), {
        name: parameter.grad.cpu()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("form", ["scene", "temporal"])
def test_fp32_equals_the_cpu(form: str, device: torch.device) -> None:
    logits, gradients = gradients_and_logits(form, device)
    expected, expected_gradients = gradients_and_logits(form, torch.device("cpu"))
    assert relative(logits, expected) < RELATIVE
    whole, expected_whole = (
        torch.cat([parts[name].flatten() for name in sorted(parts)])
        for parts in (gradients, expected_gradients)
    )
    assert relative(whole, expected_whole) < RELATIVE
    scale = float(expected_whole.norm())
    worst = {
        name: relative(gradients[name], wanted)
        for name, wanted in expected_gradients.items()
        if float(wanted.norm()) > 1e-4 * scale  # in smaller ones rounding dominates
    }
    assert max(worst.values()) < 10 * RELATIVE, max(worst, key=lambda name: worst[name])


def masks(device: torch.device, *, compiled: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The clips that a drop-path keeps, and the elements that a dropout keeps."""
    path, elements = DropPath(0.3), Dropout(0.3)
    path.layer, elements.layer = 1, 2

    def draw(keys: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        streams = mask_streams(keys, 3)
        return path(x, streams) != 0, elements(x, streams) != 0

    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(-(2**63), 2**63 - 1, (64,), generator=generator).to(device)
    run = torch.compile(draw) if compiled else draw
    one, other = run(keys, torch.ones(64, 51, 17, device=device))
    return one.cpu(), other.cpu()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_masks_equal_the_cpu_bit_for_bit(compiled: bool, device: torch.device) -> None:
    for found, expected in zip(
        masks(device, compiled=compiled), masks(torch.device("cpu"), compiled=False), strict=True
    ):
        assert torch.equal(found, expected)
        assert 0.5 < expected.float().mean() < 0.9
