"""Linear layers in FP8: errors that the rounding explains, what is kept, and which layers compute so."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from models import UniFormerV2, create_model
from models import fp8 as module
from models.fp8 import BACKWARD, FORWARD, fp8_linear
from models.linear import Linear, Origin
from models.local_block import use_fp8

# Rounding to m bits of mantissa errs by at most 2^-(m+1) of a number: 2^-4 in e4m3, 2^-3 in e5m2.
E4M3, E5M2 = 2**-4, 2**-3


def operands(rows: int = 37) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x, weight = torch.randn(3, rows, 64), 0.1 * torch.randn(96, 64)
    return (
        x.requires_grad_(),
        weight.requires_grad_(),
        torch.randn(96).requires_grad_(),
        torch.randn(3, rows, 96),
    )


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    values, scale = module._quantise(x, dtype)
    return values.float() * scale


@pytest.mark.parametrize(("dtype", "error"), [(FORWARD, E4M3), (BACKWARD, E5M2)])
@pytest.mark.parametrize("size", [1.0, 3e-12, 7e11])
def test_numbers_err_by_half_of_the_last_bit_whatever_their_size(
    dtype: torch.dtype, error: float, size: float
) -> None:
    torch.manual_seed(0)
    x = size * torch.randn(1000)
    values, scale = module._quantise(x, dtype)
    assert torch.equal(scale.log2(), scale.log2().round())
    # Numbers below the least normal one, 2^-6 and 2^-14, err by half of the step between those.
    step = {FORWARD: 2**-9, BACKWARD: 2**-16}[dtype]
    difference = (values.float() * scale - x).abs()
    assert (difference <= torch.maximum(error * x.abs(), step / 2 * scale) * (1 + 1e-6)).all()
    assert torch.equal(rounded(rounded(x, dtype), dtype), rounded(x, dtype))


@pytest.mark.parametrize("scale", [1.0, 1.702])
@pytest.mark.parametrize("rows", [32, 37])
def test_results_and_gradients_are_those_of_the_rounded_operands(rows: int, scale: float) -> None:
    x, weight, bias, gradient = operands(rows)
    result = fp8_linear(x, weight, bias, scale=scale)
    x8, weight8, gradient8 = rounded(x, FORWARD), rounded(weight, FORWARD), rounded(gradient, BACKWARD)
    close: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-4}  # sums in another order
    torch.testing.assert_close(result, F.linear(x8, scale * weight8, bias), **close)
    of_x, of_weight, of_bias = torch.autograd.grad(result, (x, weight, bias), gradient)
    torch.testing.assert_close(of_x, scale * gradient8 @ weight8, **close)
    of_rows = scale * gradient8.flatten(0, 1).T @ x8.flatten(0, 1)
    torch.testing.assert_close(of_weight, of_rows, **close)
    torch.testing.assert_close(of_bias, gradient.sum((0, 1)), **close)


def test_operands_are_as_a_gpu_needs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums and columns are multiples of 16; rows of the first and columns of the second are contiguous."""
    multiply, calls = torch._scaled_mm, []

    def checked(a: Tensor, b: Tensor, *others: Any, **named: Any) -> Tensor:
        assert a.shape[1] % 16 == 0 == b.shape[1] % 16
        assert a.is_contiguous() and b.t().is_contiguous()
        calls.append((a.dtype, b.dtype))
        return multiply(a, b, *others, **named)

    monkeypatch.setattr(torch, "_scaled_mm", checked)
    x, weight, bias, gradient = operands(rows=37)
    torch.autograd.grad(fp8_linear(x, weight, bias), (x, weight), gradient)
    assert calls == [(FORWARD, FORWARD), (BACKWARD, FORWARD), (BACKWARD, FORWARD)]


def test_errors_beside_float32_are_those_of_the_rounding() -> None:
    x, weight, bias, gradient = operands()
    own = fp8_linear(x, weight, bias)
    exact = F.linear(x, weight, bias)

    def error(one: Tensor, other: Tensor) -> float:
        return float((one - other).detach().norm() / other.detach().norm())

    # Independent errors of two factors add up as squares; uniform ones are on average 1 / sqrt(3) of the
    # largest, and 0.72 of that as mantissas are spread between 1 and 2.
    typical = 0.72 / 3**0.5
    forward, backward = typical * E4M3 * 2**0.5, typical * (E4M3**2 + E5M2**2) ** 0.5
    assert 0.5 * forward < error(own, exact) < 1.2 * forward
    gradients = zip(
        torch.autograd.grad(own, (x, weight), gradient),
        torch.autograd.grad(exact, (x, weight), gradient),
        strict=True,
    )
    for one, other in gradients:
        assert 0.5 * backward < error(one, other) < 1.2 * backward


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_stay_so(bad: float) -> None:
    x, weight, bias, gradient = operands()
    gradient[0, 0, 0] = bad
    of_x, of_weight = torch.autograd.grad(fp8_linear(x, weight, bias), (x, weight), gradient)
    assert not of_x.isfinite().all() and not of_weight.isfinite().all()
    x.data[0, 0, 0] = bad
    assert not fp8_linear(x, weight, bias).isfinite().all()
    zeros = fp8_linear(torch.zeros(16, 64), weight, None)
    assert torch.equal(zeros, torch.zeros(16, 96))


def test_the_fp8_copy_is_kept_or_the_origin() -> None:
    x, weight, bias, gradient = operands()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        plain = fp8_linear(x, weight, bias)
    assert {tensor.dtype for tensor in kept if tensor.numel() == x.numel()} == {FORWARD}
    norm = torch.nn.LayerNorm(64)
    layer = Linear(64, 96)
    layer.fp8 = True
    inputs = [x, *norm.parameters(), *layer.parameters()]
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        again = layer(norm(x), Origin(norm, x))
    assert FORWARD not in {tensor.dtype for tensor in kept}
    expected = torch.autograd.grad(layer(norm(x)), inputs, gradient)
    assert all(map(torch.equal, torch.autograd.grad(again, inputs, gradient), expected))
    assert plain.shape == again.shape


def model(recomputed_blocks: int = 0) -> UniFormerV2:
    torch.manual_seed(0)
    return create_model(
        "tiny", form="temporal", frames=4, num_classes=5, resolution=32, recomputed_blocks=recomputed_blocks
    ).train()


def outcome(made: UniFormerV2) -> list[Tensor]:
    """Logits and gradients."""
    torch.manual_seed(1)
    logits = made(torch.randn(2, 3, 4, 32, 32), torch.arange(2))
    F.cross_entropy(logits.float(), torch.arange(2)).backward()
    return [logits.detach(), *(p.grad for p in made.parameters() if p.grad is not None)]


def test_only_the_blocks_linear_layers_compute_in_fp8_and_only_in_training() -> None:
    made = model()
    use_fp8(made)
    with_fp8 = {name for name, part in made.named_modules() if getattr(part, "fp8", False)}
    assert with_fp8 == {
        f"blocks.{block}.{part}"
        for block in range(4)
        for part in ("attention.qkv", "attention.out", "mlp.expand", "mlp.contract")
    }
    clips, plain = torch.randn(1, 3, 4, 32, 32), model()
    assert torch.equal(made.eval()(clips), plain.eval()(clips))


def test_recomputed_blocks_give_the_same_bits_and_autocast_near_ones() -> None:
    made, again, plain = model(), model(recomputed_blocks=2), model()
    use_fp8(made)
    use_fp8(again)
    result, exact = outcome(made), outcome(plain)
    assert all(map(torch.equal, result, outcome(again)))
    assert not torch.equal(result[0], exact[0])
    with torch.autocast("cpu", torch.bfloat16):
        half = model()
        use_fp8(half)
        logits = outcome(half)[0]
    # Rounding to bf16 errs by 2^-9 of a number, and may move another one to the next in FP8.
    torch.testing.assert_close(
        logits.float(), result[0], rtol=0, atol=2 * E4M3 * float(result[0].abs().max())
    )


def test_it_is_traced_into_one_graph() -> None:
    torch._dynamo.reset()
    layer = Linear(32, 48)
    layer.fp8 = True
    x = torch.randn(20, 32, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    inputs, gradient = [x, *layer.parameters()], torch.randn(20, 48)
    assert all(
        map(
            torch.equal,
            torch.autograd.grad(compiled(x), inputs, gradient),
            torch.autograd.grad(layer(x), inputs, gradient),
        )
    )
