"""The whole model: input shapes, frame order, freezing, recomputation, initial logits."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from models import ModelError, UniFormerV2, build_config, create_model
from models.config import FUSIONS


def gradients(model, clips, keys=None):
    model.zero_grad(set_to_none=True)
    logits = model(clips, keys)
    F.cross_entropy(logits, torch.arange(len(clips))).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), grads


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 8, 16, 16), "clips have 8 frames, .* 4"),
        ((2, 1, 4, 16, 16), "clips have 1 channels, .* 3"),
        ((2, 3, 4, 24, 16), "clips have 24 rows, .* 16"),
        ((2, 3, 4, 16, 8), "clips have 8 columns, .* 16"),
        ((3, 4, 16, 16), "clips have 4 dimensions"),
    ],
)
def test_a_clip_of_another_shape_is_refused(small, shape, message):
    with pytest.raises(ModelError, match=message):
        small()(torch.zeros(shape))


@pytest.mark.parametrize("form", ["scene", "temporal"])
def test_clips_are_independent(small, clips, form):
    model = small(form).eval()
    torch.testing.assert_close(model(clips)[1:], model(clips[1:]), atol=1e-6, rtol=1e-5)


def test_the_scene_form_without_global_blocks_ignores_frame_order(small, clips):
    model = small("scene", global_layers=()).eval()
    assert model.fusion is None
    assert model.balance is None
    shuffled = clips[:, :, [2, 0, 3, 1]]
    torch.testing.assert_close(model(shuffled), model(clips), atol=1e-5, rtol=0)


@pytest.mark.parametrize("overrides", [{}, {"global_layers": ()}, {"temporal_downsample": False}], ids=str)
def test_the_temporal_form_depends_on_frame_order(small, clips, overrides):
    model = small("temporal", **overrides).eval()
    assert (model(clips[:, :, [2, 0, 3, 1]]) - model(clips)).abs().max() > 1e-3


def test_global_blocks_depend_on_frame_order_through_the_dpe(small, clips):
    model = small("scene").eval()
    assert (model(clips[:, :, [2, 0, 3, 1]]) - model(clips)).abs().max() > 1e-4


@pytest.mark.parametrize("form", ["scene", "temporal"])
def test_a_new_model_is_its_image_model(form):
    """The video parts output zero at first, and the head's norm cancels the factor 0.5 of the balance."""
    fields = {"frames": 8, "num_classes": 7, "norm_eps": 1e-12}
    model = create_model("tiny", form=form, **fields).eval()
    image = create_model("tiny", form=form, global_layers=(), local_mhra=0, **fields).eval()
    image.load_state_dict(model.state_dict(), strict=False)
    for both in (model, image):
        both.head_norm.eps = 1e-12
    clips = torch.randn(2, 3, 8, 64, 64)
    torch.testing.assert_close(model(clips), image(clips), atol=1e-5, rtol=0)


def test_the_initial_loss_is_that_of_uniform_logits():
    model = create_model("tiny", form="temporal", frames=8, num_classes=10)
    loss = F.cross_entropy(model(torch.randn(8, 3, 8, 64, 64)), torch.arange(8))
    assert loss.item() == pytest.approx(torch.tensor(10.0).log().item(), abs=0.5)


@pytest.mark.parametrize("form", ["scene", "temporal"])
def test_every_parameter_has_a_gradient(small, clips, form):
    model = small(form).train()
    _, grads = gradients(model, clips)
    assert grads.keys() == dict(model.named_parameters()).keys()
    assert [name for name, grad in grads.items() if not grad.any()] == []


def test_initialisation_at_zero_and_with_batch_norm_untouched():
    model = create_model("tiny", form="temporal", frames=8, num_classes=10)
    zero = [name for name, p in model.named_parameters() if p.dim() != 1 and not p.any()]
    local = [f"blocks.{i}.local_{j}.expand.weight" for i in range(4) for j in (1, 2)]
    last = ["attention.out.weight", "mlp.contract.weight"]
    added = ["fusion.query"] + [f"fusion.blocks.{i}.{name}" for i in range(2) for name in last]
    assert sorted(zero) == sorted(local + added)
    assert not model.balance.any()
    block = model.fusion.blocks[0]
    for weight in (block.attention.in_proj_weight, block.mlp.expand.weight):
        xavier_bound = (6 / sum(weight.shape)) ** 0.5
        assert weight.abs().max().item() == pytest.approx(xavier_bound, rel=0.01)
    assert not block.dpe.bias.any()


def test_the_backbone_has_the_initialisation_of_clip():
    model = create_model("tiny", form="scene", frames=8, num_classes=10, width=256, depth=2)
    block = model.blocks[0]
    for tensor, std in [
        (model.class_token, 1 / 16),
        (model.position_embedding, 1 / 16),
        (model.patch_embedding.weight, 192**-0.5),
        (block.attention.qkv.weight, 1 / 16),
        (block.attention.out.weight, 1 / 32),
        (block.mlp.expand.weight, 512**-0.5),
        (block.mlp.contract.weight, 1 / 32),
    ]:
        assert tensor.std().item() == pytest.approx(std, rel=0.15)
    assert not block.attention.qkv.bias.any()


def test_a_frozen_backbone_gets_no_gradient_and_keeps_no_graph(small, clips):
    model = small(frozen_backbone=True).train()
    seen = []
    model.blocks[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    _, grads = gradients(model, clips)
    assert model.balance is None
    assert {name.split(".")[0] for name in grads} == {"fusion", "head_norm", "head"}
    assert not seen[0].requires_grad
    frozen = {name.split(".")[0] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"patch_embedding", "class_token", "position_embedding", "ln_pre", "blocks"}


def test_a_frozen_model_uses_the_video_token_only(small, clips):
    model = small(frozen_backbone=True, global_layers=(0,)).eval()
    before = model(clips)
    nn.init.zeros_(model.blocks[1].mlp.contract.weight)
    torch.testing.assert_close(model(clips), before, atol=0, rtol=0)


@pytest.mark.parametrize("form", ["scene", "temporal"])
@pytest.mark.parametrize("count", [1, 2])
def test_recomputation_changes_no_gradient_and_no_statistic(small, clips, form, count):
    regularised = {"drop_path": 0.3, "global_drop_path": 0.3, "head_dropout": 0.3, "global_mlp_dropout": 0.3}
    plain = small(form, **regularised).train()
    frugal = UniFormerV2(small(form, **regularised, recomputed_blocks=count).config).train()
    frugal.load_state_dict(plain.state_dict())
    results = []
    for model in (plain, frugal):
        results.append((*gradients(model, clips, torch.tensor([3, 8])), dict(model.named_buffers())))
    for expected, given in zip(*results, strict=True):
        torch.testing.assert_close(given, expected, atol=0, rtol=0)


def test_recomputation_runs_the_configured_blocks_twice(small, clips):
    model = small(recomputed_blocks=1).train()
    runs = [0, 0]
    for index, block in enumerate(model.blocks):
        # Recomputation stops when it has all tensors for the backward, so the end of a block may not run
        # again.
        qkv = block.attention.qkv
        qkv.register_forward_hook(lambda *_, index=index: runs.__setitem__(index, runs[index] + 1))
    gradients(model, clips)
    assert runs == [2, 1]


def counted_once(model, clips, backend=None):
    """Logits, gradients and buffers after one forward and backward, compiled as one graph or not."""
    torch._dynamo.reset()
    run = torch.compile(model, backend=backend, fullgraph=True) if backend else model
    logits = run(clips, torch.tensor([3, 8]))
    logits.square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return logits.detach(), gradients, dict(model.named_buffers())


@pytest.mark.parametrize(
    "backend", [pytest.param("aot_eager", marks=pytest.mark.soak), "aot_eager_decomp_partition"]
)
def test_compiled_recomputation_changes_no_gradient_and_counts_statistics_once(small, clips, backend):
    options = {"drop_path": 0.3, "head_dropout": 0.3}
    plain = small("temporal", **options).train()
    compiled = UniFormerV2(small("temporal", **options, recomputed_blocks=2).config).train()
    compiled.load_state_dict(plain.state_dict())
    expected, given = counted_once(plain, clips), counted_once(compiled, clips, backend)
    for one, other in zip(expected, given, strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)
    assert {int(b) for name, b in given[2].items() if name.endswith("num_batches_tracked")} == {1}


def kept_for_the_backward(model, clips, backend=None):
    """Bytes of activations between forward and backward."""
    torch._dynamo.reset()
    run = torch.compile(model, backend=backend, fullgraph=True) if backend else model
    run(clips).sum().backward()
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = run(clips)
    del logits
    return sum(sizes.values())


@pytest.mark.parametrize("backend", [None, "aot_eager_decomp_partition"])
def test_recomputation_keeps_less_for_the_backward_also_when_compiled(small, backend):
    clips = torch.randn(8, 3, 4, 16, 16)
    all_kept = kept_for_the_backward(small(global_layers=()).train(), clips, backend)
    frugal = small(global_layers=(), recomputed_blocks=2).train()
    assert kept_for_the_backward(frugal, clips, backend) < 0.5 * all_kept


def graphs_of(run, keys):
    """Graphs that calls with each of these keys compile."""
    torch._dynamo.reset()
    counters.clear()
    for each in keys:
        run(each)
    return counters["stats"]["unique_graphs"]


KEYS = (torch.tensor([3, 8]), torch.tensor([5, 1]))
DEEP = {"depth": 14, "width": 8, "drop_path": 0.3}


def test_all_blocks_are_compiled_as_one_graph(small, clips):
    model = small(**DEEP, recomputed_blocks=5, global_layers=(9,)).train()
    run = torch.compile(model, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert graphs_of(lambda keys: run(clips, keys), KEYS) == 1


@pytest.mark.parametrize("form", ["scene", "temporal"])
def test_blocks_that_are_compiled_one_by_one_share_a_graph(small, clips, form):
    """They differ by the numbers of their masks, which torch.compile would hold for constants."""
    model = small(form, **DEEP, global_layers=()).train()
    plain = copy.deepcopy(model)
    for path in (module for each in (model, plain) for module in each.modules() if hasattr(module, "rate")):
        path.rate = 0.3  # a constant of the graph: with `linear_rates`, each rate has its own
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    assert graphs_of(lambda keys: model(clips, keys), KEYS) == 1
    torch.testing.assert_close(model(clips, KEYS[0]), plain(clips, KEYS[0]), atol=1e-5, rtol=1e-5)


def test_bfloat16_weights_are_close_to_float32(small, clips):
    model = small("temporal").eval()
    expected = model(clips)
    given = model.bfloat16()(clips.bfloat16())
    assert given.dtype == torch.bfloat16
    torch.testing.assert_close(given.float(), expected, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_autocast_runs_forward_and_backward(small, clips, fusion):
    model = small("temporal", fusion=fusion).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(clips)
    logits.float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("rate", ["global_mlp_dropout", "head_dropout", "drop_path", "global_drop_path"])
def test_every_regulariser_acts_in_training_only(small, clips, rate):
    model = small(**{rate: 0.5}, global_layers=(0, 1))
    plain = UniFormerV2(small(global_layers=(0, 1)).config)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.eval()(clips), plain.eval()(clips), atol=0, rtol=0)
    outputs = [model.train()(clips) for _ in range(10)]
    assert max((output - outputs[0]).abs().max() for output in outputs) > 1e-3
    torch.testing.assert_close(plain.train()(clips), plain(clips), atol=0, rtol=0)


def test_the_config_is_on_the_model():
    config = build_config("tiny", form="scene", frames=8, num_classes=3)
    model = create_model("tiny", form="scene", frames=8, num_classes=3)
    assert model.config == config
    assert model(torch.zeros(1, 3, 8, 64, 64)).shape == (1, 3)


def loss_on_time_directions(model, steps):
    """Trains to tell clips from the same clips played backwards; returns the last loss."""
    forwards = torch.randn(8, 3, 4, 16, 16)
    clips = torch.cat([forwards, forwards.flip(2)])
    labels = torch.arange(2).repeat_interleave(8)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    for _ in range(steps):
        loss = F.cross_entropy(model(clips), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_the_direction_of_time_is_learned_from_scratch_by_the_temporal_form_only(small):
    temporal = small("temporal", randomised=False, num_classes=2)
    blind = small("scene", randomised=False, num_classes=2, global_layers=())
    assert loss_on_time_directions(temporal, steps=60) < 0.05
    assert loss_on_time_directions(blind, steps=60) > 0.69
