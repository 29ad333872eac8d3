"""The kernels of a step on paper: FLOPs by the formulas of the model, and what is fused."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from models import build_config
from models.cost import multiply_accumulates, trainable_parameter_count
from trainer.engine.step_kernels import (
    ATTENTION,
    CONVOLUTIONS,
    ELEMENTWISE,
    FUSED,
    NORMS,
    OPTIMISER,
    PRODUCTS,
    Device,
    Kernel,
    KernelRecorder,
    fuse,
    record_step,
    totals_by_kind,
)


def vit(**overrides):
    """An image ViT without global blocks, whose FLOPs are those of the paper's equations."""
    fields = {"resolution": 32, "width": 64, "depth": 3, "heads": 4, "frames": 4, "num_classes": 8}
    return build_config("tiny", form="scene", global_layers=(), **{**fields, **overrides})


def flops(step, *kinds):
    return sum(kernel.flops for kernel in step.kernels if kernel.kind in kinds)


@pytest.mark.parametrize("batch", [1, 3])
def test_flops_are_three_times_the_forwards(batch):
    config = vit()
    tokens, side = 1 + config.grid**2, config.frames
    attention = 2 * side * config.depth * 2 * tokens**2 * config.width  # of a clip's forward
    embedding = config.frames * config.grid**2 * config.width * 3 * config.patch_size**2
    forward = 2 * multiply_accumulates(config)
    step = record_step(config, batch)
    # Pixels need no gradient. Fused attention computes the affinities again in the backward.
    assert flops(step, PRODUCTS) == batch * (3 * (forward - attention) - 2 * embedding)
    assert flops(step, ATTENTION) == batch * 3.5 * attention
    assert flops(step, NORMS, ELEMENTWISE) == 0


def test_a_depthwise_convolution_counts_its_own_channel_only():
    config = dataclasses.replace(vit(), global_layers=(2,))
    step = record_step(config, 1)
    patches = config.frames * config.grid**2
    # Three planes of nine taps; twice as much in the backward: of the tokens and of the weight.
    assert flops(step, CONVOLUTIONS) == 3 * 2 * 27 * patches * config.width


def test_recomputed_blocks_run_their_kernels_again():
    none, all_blocks = (record_step(vit(recomputed_blocks=count), 1) for count in (0, 3))
    count = {
        name: totals_by_kind(step.kernels, lambda _: 0.0) for name, step in (("0", none), ("3", all_blocks))
    }
    assert count["3"][ATTENTION][0] == count["0"][ATTENTION][0] + 3
    # QKV, projection and the MLP's first layer; nothing needs the result of its second.
    assert count["3"][PRODUCTS][0] == count["0"][PRODUCTS][0] + 3 * 3


def test_another_linear_in_this_process_changes_nothing(monkeypatch):
    plain = record_step(vit(recomputed_blocks=3), 1)
    monkeypatch.setattr(F, "linear", lambda x, weight, bias=None: (x @ weight.T).clone())
    assert [k.bytes for k in record_step(vit(recomputed_blocks=3), 1).kernels] == [
        k.bytes for k in plain.kernels
    ]


def test_the_update_reads_and_writes_master_weights_and_moments():
    (update,) = record_step(vit(), 1).update
    assert update.kind == OPTIMISER
    assert update.bytes == 30 * trainable_parameter_count(vit())


def test_views_are_no_kernels_and_an_expanded_tensor_is_read_once():
    with KernelRecorder() as recorder:
        x, bias = torch.empty(4, 8, device="meta"), torch.empty(8, device="meta")
        x.view(2, 2, 8).transpose(0, 1).add_(bias.expand(2, 2, 8))
    (added,) = recorder.kernels
    assert added.kind == ELEMENTWISE
    assert sorted(added.read.values()) == [4 * 8, 4 * 32]
    assert list(added.written.values()) == [4 * 32]


def kernel(kind, read, written):
    """A kernel that reads and writes tensors of 100 bytes."""
    return Kernel(kind, 0, dict.fromkeys(read, 100), dict.fromkeys(written, 100))


def test_connected_kernels_are_fused_and_keep_only_what_others_need():
    first = kernel(ELEMENTWISE, [1, 2], [3])
    second = kernel(NORMS, [3], [4, 5])  # nothing reads 5: a result
    product = kernel(PRODUCTS, [4], [6])
    last = kernel(ELEMENTWISE, [6, 3], [7])
    fused, kept, alone = fuse([first, second, product, last])
    assert fused.kind == FUSED
    assert fused.read == {1: 100, 2: 100}
    assert fused.written == {3: 100, 4: 100, 5: 100}  # 3 is read after the product
    assert kept == product
    assert alone == last


def test_a_tensor_inside_a_fused_kernel_takes_no_memory_traffic():
    (fused,) = fuse([kernel(ELEMENTWISE, [1], [2]), kernel(ELEMENTWISE, [2], [3])])
    assert fused.bytes == 200


def test_two_chains_that_meet_are_one_kernel():
    chains = [kernel(ELEMENTWISE, [1], [2]), kernel(ELEMENTWISE, [3], [4]), kernel(ELEMENTWISE, [2, 4], [5])]
    (fused,) = fuse(chains)
    assert fused.read == {1: 100, 3: 100}
    assert fused.written == {5: 100}


def test_no_kernel_is_fused_over_a_product_that_lies_between():
    kernels = [kernel(ELEMENTWISE, [1], [2]), kernel(PRODUCTS, [2], [3]), kernel(ELEMENTWISE, [2, 3], [4])]
    assert len(fuse(kernels)) == 3


def test_a_kernel_takes_as_long_as_its_flops_or_its_bytes():
    device = Device(flops=10.0, bandwidth=100.0, peak=20.0, least=0.5)
    assert device.seconds(Kernel(PRODUCTS, 100, {1: 100}, {})) == 10
    assert device.seconds(Kernel(PRODUCTS, 10, {1: 500}, {2: 500})) == 10
    assert device.seconds(Kernel(PRODUCTS, 1, {}, {})) == 0.5


def test_compiled_steps_move_fewer_bytes_and_compute_the_same():
    step = record_step(vit(), 2)
    fused = step.fused()
    assert flops(fused, PRODUCTS, ATTENTION) == flops(step, PRODUCTS, ATTENTION)
    assert sum(k.bytes for k in fused.kernels) < 0.9 * sum(k.bytes for k in step.kernels)
    assert fused.seconds(Device()) < step.seconds(Device())
