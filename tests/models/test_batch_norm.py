"""Batch norm over ranks: real processes against one process that has the whole batch.

A check runs in every rank; each knows the whole batch, computes the answer by itself, and compares its share.
"""

import itertools
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from models import create_model
from models.batch_norm import GlobalBatchNorm, convert_batch_norm, normalise
from tests.trainer.ranks import prepared_context

CHANNELS = 6


def join(rank, world, meeting):
    torch.set_num_threads(1)
    # A rank whose check fails leaves the others waiting in a collective.
    patience = timedelta(seconds=30)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=patience
    )


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.soak), 4], ids="{} ranks".format)
def in_ranks(request, tmp_path_factory):
    """Runs a check in each rank, and raises the error of any of them."""
    meeting = tmp_path_factory.mktemp("ranks") / "meeting"
    prepared = prepared_context()
    with ExitStack() as stack:
        ranks = [
            stack.enter_context(
                ProcessPoolExecutor(1, prepared, initializer=join, initargs=(rank, request.param, meeting))
            )
            for rank in range(request.param)
        ]

        def run(check, *arguments):
            for answer in [rank.submit(check, *arguments) for rank in ranks]:
                answer.result()

        yield run


def randomised(module):
    """The model with random values in all tensors."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def shares(sizes):
    """Where each rank's share of the batch begins and ends."""
    ends = list(itertools.accumulate(sizes, initial=0))
    return [slice(begin, end) for begin, end in itertools.pairwise(ends)]


def total(tensor):
    """Summed over the ranks."""
    summed = tensor.clone()
    dist.all_reduce(summed)
    return summed


def assert_same_on_all_ranks(tensor):
    copies = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(copies, tensor)
    assert all(torch.equal(copy, tensor) for copy in copies)


def check_against_the_whole_batch(sizes, inner, offset, options):
    """Outputs, gradients and running statistics of three steps; `sizes` are of the ranks' shares."""
    torch.manual_seed(0)  # every rank draws the same
    sizes = sizes[: dist.get_world_size()]
    own = shares(sizes)[dist.get_rank()]
    norm = randomised(GlobalBatchNorm(CHANNELS, **options))
    whole = nn.BatchNorm1d(CHANNELS, **options).double()
    whole.load_state_dict(norm.state_dict())
    for step in range(3):
        batch = offset + (1 + step) * torch.randn(sum(sizes), CHANNELS, *inner)
        batch[:3] *= 2  # so that shares differ in mean and variance
        towards = torch.randn_like(batch)
        x, x_whole = batch[own].requires_grad_(), batch.double().requires_grad_()
        y, y_whole = norm(x), whole(x_whole)
        torch.testing.assert_close(y, y_whole[own].float(), atol=2e-6 * max(1, offset), rtol=2e-6)
        norm.zero_grad()
        whole.zero_grad()
        (y * towards[own]).sum().backward()
        (y_whole * towards).sum().backward()
        torch.testing.assert_close(x.grad, x_whole.grad[own].float(), atol=2e-6 * max(1, offset), rtol=2e-6)
        for mine, other in zip(norm.parameters(), whole.parameters(), strict=True):
            near = {"atol": 1e-5 * max(1, offset), "rtol": 2e-6}
            torch.testing.assert_close(total(mine.grad), other.grad.float(), **near)
        for mine, other in zip(norm.buffers(), whole.buffers(), strict=True):
            torch.testing.assert_close(mine, other.to(mine.dtype), atol=1e-6, rtol=2e-6)
            assert_same_on_all_ranks(mine)


@pytest.mark.parametrize(
    ("sizes", "inner", "offset", "options"),
    [
        ((8, 8, 8, 8), (), 0, {}),
        ((7, 1, 12, 4), (5,), 0, {"momentum": None}),
        ((9, 0, 3, 20), (), 100, {"eps": 1e-3}),
        ((3, 5, 1, 1), (2,), 0, {"affine": False}),
        ((3, 5, 1, 1), (), 0, {"track_running_stats": False}),
    ],
    ids=["even", "uneven", "a rank without clips, far from zero", "not affine", "untracked"],
)
def test_ranks_normalise_as_one_process(in_ranks, sizes, inner, offset, options):
    in_ranks(check_against_the_whole_batch, sizes, inner, offset, options)


def check_the_origin():
    torch.manual_seed(dist.get_rank())
    norm, rows = randomised(GlobalBatchNorm(CHANNELS)), torch.randn(9, CHANNELS)
    y, origin = normalise(norm, rows)
    assert norm.num_batches_tracked == 1
    gather, dist.all_gather = dist.all_gather, None
    try:
        assert torch.equal(origin.compute(origin.source), y)
    finally:
        dist.all_gather = gather
    assert norm.num_batches_tracked == 1
    assert not torch.allclose(nn.functional.batch_norm(rows, None, None, norm.weight, norm.bias, True), y)
    assert normalise(norm.eval(), rows)[1] is None


def test_rows_are_normalised_again_without_communication(in_ranks):
    in_ranks(check_the_origin)


def check_bfloat16():
    torch.manual_seed(0)
    world, rank = dist.get_world_size(), dist.get_rank()
    batch = (50 + torch.randn(8 * world, CHANNELS)).bfloat16()
    norm = randomised(GlobalBatchNorm(CHANNELS))
    whole = nn.BatchNorm1d(CHANNELS)
    whole.load_state_dict(norm.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        y = norm(batch.chunk(world)[rank])
    assert y.dtype == torch.bfloat16
    expected = whole(batch.float()).chunk(world)[rank]
    torch.testing.assert_close(y.float(), expected, atol=1e-2, rtol=1e-2)
    torch.testing.assert_close(norm.running_var, whole.running_var, atol=1e-6, rtol=1e-5)


def test_statistics_of_bfloat16_are_float32(in_ranks):
    in_ranks(check_bfloat16)


def gradients(model, clips, labels, keys):
    model.zero_grad(set_to_none=True)
    loss = F.cross_entropy(model(clips, keys), labels)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def temporal_model(recomputed):
    torch.manual_seed(1)
    return randomised(
        create_model(
            "tiny", form="temporal", frames=4, num_classes=5, resolution=16, width=16, depth=2, heads=2,
            drop_path=0.3, global_drop_path=0.3, global_mlp_dropout=0.3, head_dropout=0.3,
            recomputed_blocks=recomputed,
        )
    )  # fmt: skip


def check_a_whole_model(recomputed):
    """Dropout and drop-path on: the ranks' mean loss and mean gradients are those of one process."""
    world, rank = dist.get_world_size(), dist.get_rank()
    model = convert_batch_norm(temporal_model(recomputed), torch.device("cpu"))
    whole = temporal_model(0)
    torch.manual_seed(2)
    clips, labels, keys = torch.randn(8, 3, 4, 16, 16), torch.randint(5, (8,)), torch.randint(2**62, (8,))
    own = slice(rank * 8 // world, (rank + 1) * 8 // world)
    loss, grads = gradients(model, clips[own], labels[own], keys[own])
    expected_loss, expected = gradients(whole, clips, labels, keys)
    torch.testing.assert_close(total(loss) / world, expected_loss, atol=1e-6, rtol=1e-6)
    for name, grad in grads.items():
        torch.testing.assert_close(total(grad) / world, expected[name], atol=2e-6, rtol=1e-5, msg=name)
    for (name, mine), other in zip(model.named_buffers(), whole.buffers(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-6, rtol=1e-6, msg=name)
        assert_same_on_all_ranks(mine)


@pytest.mark.parametrize("recomputed", [0, 2])
def test_a_model_trains_over_ranks_as_in_one_process(in_ranks, recomputed):
    in_ranks(check_a_whole_model, recomputed)


def check_the_conversion():
    model = temporal_model(0)
    model.blocks[1].eval()
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for device, kind in (("cpu", GlobalBatchNorm), ("cuda", nn.SyncBatchNorm)):
        model = convert_batch_norm(model, torch.device(device))
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert [type(norm) for norm in norms] == [kind] * 4
        assert [norm.training for norm in norms] == [True, True, False, False]
        after = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        assert list(after) == list(state)
        assert all(after[name] is tensor for name, tensor in state.items())
    lone = nn.BatchNorm2d(3, eps=0.1, momentum=0.2)
    converted = convert_batch_norm(lone, torch.device("cpu"))
    assert (converted.eps, converted.momentum, converted.weight) == (0.1, 0.2, lone.weight)
    images = torch.randn(2, 3, 4, 4)
    assert torch.equal(converted.eval()(images), lone.eval()(images))


def test_conversion_keeps_every_tensor_and_name(in_ranks):
    in_ranks(check_the_conversion)


def test_one_rank_uses_torch_batch_norm():
    model = temporal_model(0)
    norm = model.blocks[0].local_1.norm
    assert convert_batch_norm(model, torch.device("cpu")) is model
    assert model.blocks[0].local_1.norm is norm
    rows = torch.randn(8, CHANNELS)
    one, other = GlobalBatchNorm(CHANNELS), nn.BatchNorm1d(CHANNELS)
    assert torch.equal(one(rows), other(rows))
    for each in (one, other):
        y, origin = normalise(each, rows)
        assert torch.equal(origin.compute(origin.source), y)
    assert one.num_batches_tracked == other.num_batches_tracked == 2
    assert normalise(nn.SyncBatchNorm(CHANNELS).eval(), rows)[1] is None
    assert torch.equal(one.running_var, other.running_var)
