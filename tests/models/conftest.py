"""Small models for the tests of this folder."""

import pytest
import torch

from models import create_model, products
from models.products import Library, pytorch_has_onednn


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


@pytest.fixture(
    params=[
        Library.PYTORCH,
        pytest.param(
            Library.ONEDNN, marks=pytest.mark.skipif(not pytorch_has_onednn(), reason="PyTorch has no oneDNN")
        ),
        Library.OPENBLAS,
    ],
    ids=lambda library: library.name.lower(),
)
def library(request, monkeypatch):
    """Computes every product in fp32 on the CPU by this library, small ones too."""
    monkeypatch.setattr(products, "_FASTEST", request.param)
    monkeypatch.setitem(products._ENOUGH_WORK, request.param, 0)
    return request.param


@pytest.fixture
def small():
    """Builds a model of two narrow blocks for 16-pixel clips of 4 frames, with every tensor random.

    Zero-initialised tensors would hide whatever comes after them.
    """

    def build(form="scene", *, randomised=True, **overrides):
        fields = {
            "resolution": 16,
            "width": 16,
            "depth": 2,
            "heads": 2,
            "frames": 4,
            "num_classes": 5,
            **overrides,
        }
        model = create_model("tiny", form=form, **fields)
        if randomised:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return model

    return build


@pytest.fixture
def clips():
    """Two clips of 4 frames, 16 x 16 pixels."""
    return torch.randn(2, 3, 4, 16, 16)
