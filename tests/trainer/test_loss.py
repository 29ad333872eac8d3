"""The training loss of mixed clips and smoothed labels, against its definition."""

import torch

from pipelines.augment.mixing import MixedLabels
from trainer.loss import masked_cross_entropy


def test_mixed_and_smoothed_labels_are_soft_targets() -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 5, dtype=torch.float64)
    labels, second, valid = torch.tensor([2, 4, -1]), torch.tensor([0, 4, -1]), torch.tensor([1, 1, 0]).bool()
    weights, smoothing = torch.tensor([0.3, 1.0, 1.0], dtype=torch.float64), 0.1
    losses = masked_cross_entropy(logits, labels, valid, MixedLabels(second, weights), smoothing)
    targets = torch.zeros(3, 5, dtype=torch.float64)
    targets[0, 2], targets[0, 0], targets[1, 4] = 0.3, 0.7, 1.0
    targets = (1 - smoothing) * targets + smoothing / 5
    expected = -(targets * logits.log_softmax(1)).sum(1)
    torch.testing.assert_close(losses[:2], expected[:2], rtol=1e-12, atol=0)  # rounding in float64
    assert losses[2] == 0


def test_without_mixing_and_smoothing_it_is_the_cross_entropy_bit_for_bit() -> None:
    logits, labels = torch.randn(4, 7), torch.tensor([0, 3, 6, 1])
    plain = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    assert torch.equal(masked_cross_entropy(logits, labels, torch.ones(4).bool()), plain)
