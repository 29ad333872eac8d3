from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models import UniFormerV2, create_model
from trainer.resilience.nan_tracer import NonfiniteTrace, trace_nonfinite


@pytest.fixture(autouse=True)
def _same_numbers_every_time() -> None:
    torch.manual_seed(0)


def model(**fields: object) -> UniFormerV2:
    small = {"resolution": 16, "patch_size": 8, "width": 16, "depth": 2, "heads": 2, "global_layers": (1,)}
    made = create_model("tiny", form="temporal", frames=4, num_classes=5, **{**small, **fields})
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return made.train()


def traced(made: UniFormerV2, clips: Tensor | None = None) -> NonfiniteTrace:
    given = torch.randn(2, 3, 4, 16, 16) if clips is None else clips
    return trace_nonfinite(made, lambda: F.cross_entropy(made(given, torch.arange(2)), torch.tensor([1, 3])))


def overflow(parameter: nn.Parameter) -> None:
    """Make a weight so large that its product is not finite, though it is itself."""
    with torch.no_grad():
        parameter.fill_(3e38)


class Root(nn.Module):
    """Its gradient at 0 is infinite."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sqrt()


def test_finite_numbers_have_no_origin_and_are_measured() -> None:
    made, clips = model(), torch.randn(2, 3, 4, 16, 16)
    logits = made(clips, torch.arange(2))
    found = traced(made, clips)
    assert found.origin is None
    records = {record.name: record for record in found.modules}
    assert records["head"].output == records[""].output == pytest.approx(float(logits.detach().abs().max()))
    assert records[""].inputs == pytest.approx(float(clips.abs().max()))
    expected = (logits.softmax(-1) - F.one_hot(torch.tensor([1, 3]), 5)) / 2
    assert records["head"].gradient == pytest.approx(float(expected.detach().abs().max()), rel=1e-4)
    assert records["head"].passed_on == pytest.approx(
        float((expected @ made.head.weight).detach().abs().max()), rel=1e-4
    )
    assert records["head"].weights == pytest.approx(
        max(float(p.detach().abs().max()) for p in made.head.parameters())
    )
    assert "blocks.1.mlp.expand" in records
    assert "fusion.blocks.0.attention" in records


def test_parameters_and_their_hooks_are_left_alone() -> None:
    made = model()
    fired: list[Tensor] = []
    for parameter in made.parameters():
        parameter.register_post_accumulate_grad_hook(fired.append)
    traced(made)
    assert not fired
    assert all(parameter.grad is None for parameter in made.parameters())
    traced(made)
    made(torch.randn(2, 3, 4, 16, 16), torch.arange(2)).sum().backward()
    assert fired


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_clips(value: float) -> None:
    clips = torch.randn(2, 3, 4, 16, 16)
    clips[1, 2, 3, 4, 5] = value
    origin = traced(model(), clips).origin
    assert origin is not None
    assert (origin.order, origin.phase, origin.module) == (0, "clips", None)
    assert "the clips themselves" in origin.description


@pytest.mark.parametrize("recomputed", [0, 2])
def test_an_output_that_overflows(recomputed: int) -> None:
    made = model(recomputed_blocks=recomputed)
    overflow(made.blocks[1].attention.qkv.weight)
    origin = traced(made).origin
    assert origin is not None
    assert (origin.phase, origin.module) == ("forward", "blocks.1.attention.qkv")
    assert "the output of blocks.1.attention.qkv" in origin.description


def test_a_weight_that_is_no_number() -> None:
    made = model()
    with torch.no_grad():
        made.fusion.query[0, 0, 3] = float("nan")
    origin = traced(made).origin
    assert origin is not None
    assert (origin.phase, origin.module) == ("forward", "fusion")
    assert origin.description == "the weight query of fusion is NaN"


def test_between_the_parts_of_a_module() -> None:
    made = model()
    overflow(made.class_token)
    overflow(made.position_embedding)
    origin = traced(made).origin
    assert origin is not None
    assert (origin.phase, origin.module) == ("forward", "")
    assert origin.description == "what the model hands to ln_pre is infinite, of finite parts"


def test_what_comes_first_has_the_lower_number() -> None:
    orders = []
    for part in ("blocks.0.mlp.expand", "blocks.1.mlp.expand", "fusion.blocks.0.mlp.expand", "head"):
        made = model()
        overflow(made.get_submodule(part).weight)
        origin = traced(made).origin
        assert origin is not None
        assert origin.module == part
        orders.append(origin.order)
    assert orders == sorted(set(orders))


@pytest.mark.parametrize("recomputes", [False, True])
def test_a_gradient_that_becomes_infinite(recomputes: bool) -> None:
    made = nn.Sequential(nn.Linear(3, 4), nn.Identity(), Root(), nn.Linear(4, 1))
    nn.init.zeros_(made[0].weight)
    nn.init.zeros_(made[0].bias)

    def run() -> Tensor:
        if recomputes:
            return checkpoint(made, torch.ones(2, 3), use_reentrant=False).sum()
        return made(torch.ones(2, 3)).sum()

    origin = trace_nonfinite(made, run).origin
    assert origin is not None
    assert (origin.phase, origin.module) == ("backward", "2")
    assert origin.description.startswith("the gradient that 2 passes on is")


def test_who_shares_an_input_with_the_culprit_is_not_accused() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 4)
            self.root = Root()
            self.scale = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            shared = self.first(x)
            return self.root(shared) + self.scale(shared)

    made = Branches()
    nn.init.zeros_(made.first.weight)
    nn.init.zeros_(made.first.bias)
    found = trace_nonfinite(made, lambda: made(torch.ones(2, 3)).sum())
    assert [record.name for record in found.modules] == ["", "first", "root", "scale"]
    assert found.origin is not None
    assert found.origin.module == "root"
    passed_on = {record.name: record.passed_on for record in found.modules}
    assert passed_on["scale"] is not None
    assert passed_on["scale"] < 10, "it passes on a finite gradient of its own"


def test_a_weight_gradient_that_overflows() -> None:
    made = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(made.weight)
    origin = trace_nonfinite(made, lambda: (made(torch.full((4, 1), 2e38)) * 1.0).sum()).origin
    assert origin is not None
    assert (origin.phase, origin.module) == ("backward", "")
    assert "the gradient of the weight weight is infinite" in origin.description


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda logits: (logits * 0).log().sum() * -1, "the loss is infinite, of finite logits"),
        (lambda logits: (logits * 0).sqrt().sum(), "the gradient of the loss, of finite logits, is"),
    ],
)
def test_the_loss_itself(loss: Callable[[Tensor], Tensor], words: str) -> None:
    made = nn.Linear(3, 2)
    origin = trace_nonfinite(made, lambda: loss(made(torch.ones(2, 3)))).origin
    assert origin is not None
    assert (origin.phase, origin.module) == ("loss", None)
    assert origin.description.startswith(words)


def test_a_compiled_model_is_looked_into_as_it_was_written() -> None:
    """Code that was compiled before the hooks were there does not look for them."""
    made, clips = model(), torch.randn(2, 3, 4, 16, 16)
    made.compile(backend="eager")
    made(clips, torch.arange(2))
    overflow(made.blocks[1].attention.qkv.weight)
    origin = traced(made, clips).origin
    assert origin is not None
    assert origin.module == "blocks.1.attention.qkv"
