"""Small models for the tests of this folder."""

import pytest
import torch

from models import create_model


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(0)


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
