"""The four fusions of section 3.3."""

import pytest
import torch

from models.config import FUSIONS


def build(small, fusion):
    torch.manual_seed(1)
    return small(fusion=fusion, global_layers=(0, 1)).fusion.eval()


def features():
    return [torch.randn(2, 4, 5, 16) for _ in range(2)]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_trains_through_the_model(small, clips, fusion):
    model = small(fusion=fusion).train()
    model(clips).square().sum().backward()
    unused = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert unused == []


def test_sequential_uses_the_token_as_the_next_query(small):
    fusion = build(small, "sequential")
    first, second = features()
    token = fusion.blocks[0](fusion.query.expand(2, -1, -1), first)
    torch.testing.assert_close(fusion([first, second]), fusion.blocks[1](token, second).squeeze(1))


def test_parallel_projects_the_concatenation(small):
    fusion = build(small, "parallel")
    given = features()
    stages = zip(fusion.blocks, fusion.query[0], given, strict=True)
    tokens = [block(query.expand(2, 1, -1), feature) for block, query, feature in stages]
    torch.testing.assert_close(fusion(given), fusion.project(torch.cat(tokens, -1)).squeeze(1))


def test_hierarchical_kv_adds_the_token_to_the_context(small):
    fusion = build(small, "hierarchical_kv")
    first, second = features()
    queries = [query.expand(2, 1, -1) for query in fusion.query[0]]
    token = fusion.blocks[0](queries[0], first)
    expected = fusion.blocks[1](queries[1], second, context=token)
    torch.testing.assert_close(fusion([first, second]), expected.squeeze(1))
    assert (expected - fusion.blocks[1](queries[1], second)).abs().max() > 1e-4


def test_hierarchical_q_adds_a_query_per_stage(small):
    fusion = build(small, "hierarchical_q")
    first, second = features()
    queries = [query.expand(2, 1, -1) for query in fusion.query[0]]
    token = fusion.blocks[0](queries[0], first)
    old, new = (fusion.blocks[1](query, second) for query in (token, queries[1]))
    torch.testing.assert_close(fusion([first, second]), (old + new).squeeze(1) / 2, atol=1e-6, rtol=1e-5)


def test_the_fusions_differ(small):
    given = features()
    outputs = [build(small, fusion)(given) for fusion in FUSIONS]
    for index, output in enumerate(outputs):
        for other in outputs[index + 1 :]:
            assert (output - other).abs().max() > 1e-3
