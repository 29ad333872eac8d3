"""`linear` against `F.linear` in float64: results, gradients and what is kept, with each library."""

import itertools

import pytest
import torch
from torch.nn import functional as F

from models.linear import Linear, Origin, linear
from models.vit import ScaledLinear

SHAPES = [((2, 3, 40), 24, 56), ((2, 3, 40), 56, 24), ((3, 5), 8, 24), ((300,), 8, 8)]


def difference(one, other):
    """Largest difference, as a share of the largest value."""
    return float((one.detach().double() - other).abs().max() / other.detach().abs().max())


@pytest.mark.parametrize("scale", [1.0, 1.702])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_result_and_gradients_are_those_of_float64(library, rows, inputs, outputs, has_bias, scale):
    torch.manual_seed(0)
    tensors = [torch.randn(*rows, inputs), torch.randn(outputs, inputs)]
    tensors += [torch.randn(outputs)] if has_bias else []
    grad = torch.randn(*rows, outputs)
    own = [tensor.clone().requires_grad_() for tensor in tensors]
    exact = [tensor.double().requires_grad_() for tensor in tensors]
    result = linear(*own, scale=scale)
    expected = F.linear(exact[0], exact[1] * scale, *exact[2:])
    assert result.shape == expected.shape and difference(result, expected) < 1e-6
    gradients = torch.autograd.grad(result, own, grad)
    for one, other in zip(gradients, torch.autograd.grad(expected, exact, grad.double()), strict=True):
        assert one.shape == other.shape and one.is_contiguous()
        assert difference(one, other) < 1e-6
    with torch.no_grad():
        assert torch.equal(linear(*own, scale=scale), result)


def test_an_input_with_an_origin_is_computed_again(library):
    torch.manual_seed(0)
    x, norm, layer = torch.randn(70, 8, requires_grad=True), torch.nn.LayerNorm(8), Linear(8, 16)
    inputs = [x, *norm.parameters(), *layer.parameters()]
    normed = norm(x)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        result = layer(normed, Origin(norm, x))
    assert normed.data_ptr() not in {tensor.data_ptr() for tensor in kept}
    gradients = torch.autograd.grad(result.square().sum(), inputs)
    expected = torch.autograd.grad(layer(norm(x)).square().sum(), inputs)
    assert all(map(torch.equal, gradients, expected))
    result = layer(norm(x), Origin(norm, x))
    with torch.no_grad():
        x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(result.sum(), layer.weight)


def test_a_scaled_layer_keeps_its_input_only(library):
    layer, x = ScaledLinear(8, 24, scale=2.0, scale_bias=True), torch.randn(100, 8)
    own = {tensor.data_ptr() for tensor in (x, *layer.parameters())}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x).sum()
    assert {tensor.data_ptr() for tensor in kept if tensor.dim() > 1} <= own


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)), ids=str)
def test_only_what_is_asked_for_has_a_gradient(library, needs):
    tensors = [torch.randn(70, 8), torch.randn(16, 8), torch.randn(16)]
    for tensor, is_needed in zip(tensors, needs, strict=True):
        tensor.requires_grad_(is_needed)
    result = linear(*tensors, scale=3.0)
    assert result.requires_grad == any(needs)
    if any(needs):
        result.sum().backward()
    assert [tensor.grad is not None for tensor in tensors] == list(needs)


def test_gradients_under_autocast_are_those_of_a_linear_layer(library):
    torch.manual_seed(0)
    x, layer = torch.randn(80, 8), Linear(8, 16)
    for scale in (1.0, 2.0):
        gradients = []
        for compute in (linear, lambda x, weight, bias, scale: F.linear(x, weight * scale, bias)):
            with torch.autocast("cpu", torch.bfloat16):
                result = compute(x, layer.weight, layer.bias, scale=scale)
            assert result.dtype == torch.bfloat16
            gradients.append(torch.autograd.grad(result.float().square().sum(), list(layer.parameters())))
        for one, other in zip(*gradients, strict=True):
            assert one.dtype == torch.float32
            assert difference(one, other.double()) < 2e-2  # bf16 has 8 bits


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
def test_a_traced_layer_computes_other_inputs(library):
    layer = ScaledLinear(8, 24, scale=2.0, scale_bias=True)
    traced = torch.jit.trace(layer, torch.randn(70, 8))
    x = torch.randn(70, 8)
    torch.testing.assert_close(traced(x), layer(x))
