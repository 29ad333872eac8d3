"""The local temporal MHRA against the 3-D modules of the released implementation."""

import pytest
import torch
from torch import nn

from models.batch_norm import frozen_running_statistics
from models.local_block import LocalTemporalMHRA


def pair(width=12, reduced=8):
    """The module, and the released implementation's description of it with the same weights."""
    local = LocalTemporalMHRA(width, reduced)
    for parameter in local.parameters():
        nn.init.normal_(parameter)
    reference = nn.Sequential(
        nn.BatchNorm3d(width),
        nn.Conv3d(width, reduced, 1),
        nn.Conv3d(reduced, reduced, (3, 1, 1), padding=(1, 0, 0), groups=reduced),
        nn.Conv3d(reduced, width, 1),
    )
    own = local.state_dict().values()
    state = {
        name: tensor.reshape(target.shape)
        for (name, target), tensor in zip(reference.state_dict().items(), own, strict=True)
    }
    reference.load_state_dict(state)
    return local, reference


def apply_reference(reference, patches):  # B T N C
    return reference(patches.permute(0, 3, 1, 2).unsqueeze(-1)).squeeze(-1).permute(0, 2, 3, 1)


def test_it_equals_the_3d_modules_in_training_and_evaluation():
    local, reference = pair()
    for step in range(3):
        patches = 2 + 3 * torch.randn(2, 4, 9, 12)
        torch.testing.assert_close(local(patches), apply_reference(reference, patches), atol=1e-4, rtol=1e-4)
        assert local.norm.num_batches_tracked == step + 1
    torch.testing.assert_close(local.norm.running_var, reference[0].running_var)
    local.eval()
    reference.eval()
    torch.testing.assert_close(local(patches), apply_reference(reference, patches), atol=1e-4, rtol=1e-4)


def test_it_is_initialised_to_zero_output():
    assert not LocalTemporalMHRA(12, 8)(torch.randn(2, 4, 9, 12)).any()


def test_its_norm_can_be_synchronised():
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(LocalTemporalMHRA(12, 8))
    assert isinstance(converted.norm, nn.SyncBatchNorm)
    assert converted.eval()(torch.randn(2, 4, 9, 12)).shape == (2, 4, 9, 12)


def test_the_class_token_is_unchanged(small, clips):
    block = small("temporal").blocks[0].eval()
    tokens = torch.randn(2, 4, 5, 16)
    moved = block._with_local(tokens, block.local_1, block.drop_local_1, None)
    assert torch.equal(moved[:, :, 0], tokens[:, :, 0])
    assert (moved[:, :, 1:] - tokens[:, :, 1:]).abs().min() > 0


def test_statistics_are_kept_only_inside():
    local, _ = pair()
    patches = torch.randn(2, 4, 9, 12)
    with frozen_running_statistics(local):
        inside = local(patches)
    assert not local.norm.running_mean.any()
    torch.testing.assert_close(local(patches), inside)
    assert local.norm.running_mean.any()


@pytest.mark.parametrize("autocast", [False, True])
def test_outputs_of_norm_and_convolution_are_computed_again(autocast):
    local, _ = pair()
    patches = torch.randn(2, 4, 9, 12, requires_grad=True)
    results = []
    for recomputes in (False, True):
        local.norm.reset_running_stats()
        kept = {}

        def keep(tensor, kept=kept):
            kept[tensor.data_ptr()] = tensor
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            result = local(patches, recomputes)
        # On CPUs with bf16, oneDNN's gradient of a depthwise convolution differs from run to run.
        asked = [local.expand.weight] if autocast else [patches, *local.parameters()]
        gradients = torch.autograd.grad(result.float().square().sum(), asked)
        activations = sorted(t.numel() for t in kept.values() if t.numel() >= 2 * 4 * 9 * 8)
        statistics = [buffer.clone() for buffer in local.norm.buffers()]
        results.append((activations, result, *gradients, *statistics))
    (before, *expected), (after, *found) = results
    rows, reduced = patches.numel(), patches.numel() * 8 // 12
    assert before == [reduced, reduced, rows, rows] and after == [reduced, rows]
    assert all(map(torch.equal, found, expected))
    assert local.norm.num_batches_tracked == 1
