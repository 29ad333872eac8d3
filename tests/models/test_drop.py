"""Masks are a function of the clip's key, the layer and the index, and are statistically random."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from models import ModelError
from models.drop import ClipMask, Dropout, DropPath, linear_rates, mask_streams

REGULARISED = {"drop_path": 0.4, "global_drop_path": 0.4, "global_mlp_dropout": 0.4, "head_dropout": 0.4}


def splitmix(z):
    """SplitMix64 on unsigned numbers, as it is published: the output after the state `z`."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def reference_streams(keys, layers):
    return splitmix(splitmix(keys.view(np.uint64))[:, None] ^ np.arange(layers, dtype=np.uint64))


def reference_kept(hashed, rate):
    """Unsigned numbers in the order that they have as signed ones, against the rate's share of 2**64."""
    return (hashed ^ np.uint64(2**63)) >= np.uint64(round(rate * 2**64))


def any_keys(count):
    extreme = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
    return torch.cat([extreme, torch.randint(-(2**63), 2**63 - 1, (count,))])[:count]


def numbered(module, layer):
    module.layer = layer
    return module


def test_streams_equal_unsigned_arithmetic(device):
    keys = any_keys(1000)
    assert np.array_equal(
        mask_streams(keys.to(device), 40).cpu().numpy().view(np.uint64), reference_streams(keys.numpy(), 40)
    )


@pytest.mark.parametrize("rate", [0.03, 0.5, 0.9])
def test_masks_equal_unsigned_arithmetic(rate, device):
    keys = any_keys(50)
    expected = reference_streams(keys.numpy(), 3)[:, 2]
    streams = mask_streams(keys.to(device), 3)
    path = numbered(DropPath(rate), 2)(torch.ones(50, 2, 2, device=device), streams).cpu()
    assert np.array_equal(
        (path != 0).numpy(), reference_kept(expected, rate)[:, None, None].repeat(2, 1).repeat(2, 2)
    )
    hashed = splitmix(expected[:, None] ^ np.arange(35, dtype=np.uint64)).reshape(50, 5, 7)
    elements = numbered(Dropout(rate), 2)(torch.ones(50, 5, 7, device=device), streams).cpu()
    assert np.array_equal((elements != 0).numpy(), reference_kept(hashed, rate))


@pytest.mark.soak
def test_compiled_masks_are_the_same(device):
    path, elements = numbered(DropPath(0.3), 1), numbered(Dropout(0.3), 2)

    def masks(keys, x):
        streams = mask_streams(keys, 3)
        return path(x, streams), elements(x, streams)

    # Rows of no multiple of a vector: an index that overflows corrupts the memory behind them.
    keys, x = any_keys(50).to(device), torch.ones(50, 5, 7, device=device)
    torch.testing.assert_close(torch.compile(masks)(keys, x), masks(keys, x), atol=0, rtol=0)


def test_the_order_of_elements_is_not_that_of_memory():
    x = torch.randn(2, 3, 4, 5)
    streams = mask_streams(any_keys(2), 1)
    permuted = x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not permuted.is_contiguous()
    assert torch.equal(Dropout(0.5)(permuted, streams), Dropout(0.5)(x, streams))


def correlation(one, other):
    return abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]).float())[0, 1].item())


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize(
    "keys", [torch.arange(2000), torch.arange(2000) << 40], ids=["low bits", "high bits"]
)
def test_masks_of_neighbours_look_independent(rate, keys):
    """Clips with neighbouring keys, layers and elements; bounds are five standard deviations."""
    streams = mask_streams(keys, 50)
    paths = torch.stack(
        [numbered(DropPath(rate), n)(torch.ones(2000, 1), streams)[:, 0] != 0 for n in range(50)]
    )
    elements = numbered(Dropout(rate), 1)(torch.ones(2000, 50), streams) != 0
    others = numbered(Dropout(rate), 2)(torch.ones(2000, 50), streams) != 0
    bound = 5 * 100_000**-0.5
    for kept in (paths.T, elements):
        assert kept.float().mean().item() == pytest.approx(1 - rate, abs=bound * (rate * (1 - rate)) ** 0.5)
        assert kept.float().mean(0).sub(1 - rate).abs().max() < 5 * (rate * (1 - rate) / 2000) ** 0.5
        assert correlation(kept[1:], kept[:-1]) < bound
        assert correlation(kept[:, 1:], kept[:, :-1]) < bound
        assert correlation(kept[1:, :-1], kept[:-1, 1:]) < bound
    assert correlation(elements, others) < bound
    assert correlation(elements[:, :1], paths[1]) < 5 * 2000**-0.5


@pytest.mark.parametrize("kind", [DropPath, Dropout])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_is_kept(kind, dtype):
    x = torch.ones(40_000, 2, dtype=dtype)
    dropped = kind(0.25)(x, mask_streams(torch.arange(40_000), 1))
    assert dropped.dtype == dtype
    assert dropped.float().mean().item() == pytest.approx(1, abs=0.015)
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3], rel=4e-3)


def test_in_bf16_what_is_kept_is_rounded_once():
    """Scaling by a rounded number would bias all clips alike."""
    x = torch.randn(100, 8, dtype=torch.bfloat16)
    dropped = DropPath(0.1)(x, mask_streams(any_keys(100), 1))
    kept = dropped[:, 0] != 0
    assert torch.equal(dropped[kept], (x[kept].double() / 0.9).bfloat16())


@pytest.mark.parametrize("kind", [DropPath, Dropout])
def test_in_fp32_what_is_kept_is_divided_also_in_the_backward(kind):
    x = torch.randn(100, 8, requires_grad=True)
    dropped = kind(0.1)(x, mask_streams(any_keys(100), 1))
    expected = x * (dropped != 0) / 0.9
    assert torch.equal(dropped, expected)
    grad = torch.randn_like(x)
    assert torch.equal(*(torch.autograd.grad(result, x, grad)[0] for result in (dropped, expected)))


def test_whole_clips_are_dropped_by_drop_path_and_elements_by_dropout():
    x = torch.ones(100, 4, 6)
    streams = mask_streams(torch.arange(100), 1)
    by_clip = (DropPath(0.5)(x, streams) == 0).flatten(1)
    assert torch.equal(by_clip.all(1), by_clip.any(1))
    by_element = (Dropout(0.5)(x, streams) == 0).flatten(1)
    assert by_element.any(1).all()
    assert not by_element.all(1).any()


@pytest.mark.parametrize("kind", [DropPath, Dropout])
@pytest.mark.parametrize(("rate", "training"), [(0.5, False), (0.0, True)])
def test_evaluation_and_rate_zero_change_nothing(kind, rate, training):
    branch = torch.randn(4, 3)
    assert kind(rate).train(training)(branch, None) is branch


@pytest.mark.parametrize("kind", [DropPath, Dropout])
def test_training_without_streams_is_refused(kind):
    with pytest.raises(ModelError, match=r"rate=0.5, layer=0.*streams"):
        kind(0.5)(torch.randn(4, 3), None)


def test_rates_grow_linearly_from_zero():
    assert linear_rates(0.4, 5) == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert linear_rates(0.4, 1) == [0]
    assert linear_rates(0.4, 0) == []


def test_the_model_uses_the_rates_of_its_config(small):
    model = small("temporal", depth=3, drop_path=0.2, global_layers=(1, 2), global_drop_path=0.4)

    def rates(block):
        return {module.rate for module in block.modules() if isinstance(module, DropPath)}

    assert [rates(block) for block in model.blocks] == [{0}, {0.1}, {0.2}]
    assert [rates(block) for block in model.fusion.blocks] == [{0}, {0.4}]


@pytest.mark.parametrize("form", ["scene", "temporal"])
def test_every_mask_of_a_model_has_its_own_stream(small, clips, form):
    model = small(form, global_layers=(0, 1), **REGULARISED).train()
    drawn = []

    def read(module, arguments, _):
        drawn.append(tuple(arguments[1][:, module.layer].tolist()))

    for module in model.modules():
        if isinstance(module, ClipMask):
            module.register_forward_hook(read)
    model(clips)
    branches = (4 if form == "temporal" else 2) + 1  # of a local block, its MLP's dropout included
    assert len(drawn) == 2 * branches + 2 * 3 + 1
    assert len(set(drawn)) == len(drawn)


def test_a_dropped_clip_skips_the_branches_of_a_block(small):
    block = small("temporal", drop_path=0.999999).blocks[1].train()
    tokens = torch.randn(2, 2, 5, 16)
    assert torch.equal(block(tokens, mask_streams(any_keys(2), 50)), tokens)


def test_masks_do_not_depend_on_the_position_or_the_other_clips(small):
    model = small(global_layers=(0, 1), **REGULARISED).train()
    clips, keys = torch.randn(4, 3, 4, 16, 16), any_keys(4)
    together = model(clips, keys)
    alone = torch.cat([model(clips[n : n + 1], keys[n : n + 1]) for n in range(4)])
    torch.testing.assert_close(alone, together, atol=1e-5, rtol=1e-5)
    order = [2, 0, 3, 1]
    torch.testing.assert_close(model(clips[order], keys[order]), together[order], atol=1e-5, rtol=1e-5)
    assert (model(clips, keys[order]) - together).abs().max() > 1e-2


@pytest.mark.parametrize("recomputed", [0, 2])
def test_training_with_keys_does_not_use_the_generator(small, clips, recomputed):
    model = small("temporal", recomputed_blocks=recomputed, **REGULARISED).train()
    keys, labels = any_keys(2), torch.arange(2)
    before = torch.get_rng_state()
    F.cross_entropy(model(clips, keys), labels).backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_without_keys_masks_come_from_the_generator(small, clips):
    model = small(**REGULARISED).train()
    torch.manual_seed(7)
    first, second = model(clips), model(clips)
    assert (first - second).abs().max() > 1e-3
    torch.manual_seed(7)
    assert torch.equal(model(clips), first)


def test_keys_are_ignored_if_nothing_is_dropped(small, clips):
    senseless = torch.zeros(7)
    for model in (small(randomised=False, **REGULARISED).eval(), small(randomised=False).train()):
        before = torch.get_rng_state()
        assert torch.equal(model(clips, senseless), model(clips))
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (torch.zeros(3, dtype=torch.int64), r"keys are torch.int64 \(3,\)"),
        (torch.zeros(2), r"keys are torch.float32 \(2,\)"),
    ],
)
def test_keys_that_do_not_fit_are_refused(small, clips, keys, words):
    with pytest.raises(ModelError, match=words):
        small(head_dropout=0.5).train()(clips, keys)
