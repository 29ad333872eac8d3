"""AdamW that skips a nonfinite step on the device, and its parameter groups."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.adamw import adamw

_BESIDE = -1
# float32 elements of a CPU's cache line: one or more whole vectors. The fused kernel rounds the elements at a
# tensor's end that fill no vector differently (docs/performance.md, "the update on a CPU").
_CACHE_LINE = 16
_MOMENTS = ("exp_avg", "exp_avg_sq")
_EMBEDDINGS = ("patch_embedding", "class_token", "position_embedding", "ln_pre")


class SkippableAdamW(torch.optim.AdamW):
    """An AdamW that leaves weights and moments as they are where the gradient is not finite.

    Fused, the kernel itself reads whether it is, so that the host never waits for the device; the step counts
    do not advance either. Otherwise the host reads it: no other AdamW of torch can be skipped on the device.

    Fused on a CPU in float32, an element's result does not depend on its place in a contiguous tensor, nor on
    the ranks that share the weights.
    """

    def __init__(self, params: Any, is_finite: Callable[[], Tensor], **options: Any) -> None:
        """Args:
        params: as for `torch.optim.AdamW`.
        is_finite: called at each step; whether the gradient is finite, the same on all ranks, as a bool
            tensor without dimensions on the device of the weights.
        options: as for `torch.optim.AdamW`.
        """
        super().__init__(params, **options)
        self._is_finite = is_finite

    def step(self, closure: Any = None) -> Any:
        finite = self._is_finite()
        if not self.defaults["fused"]:
            return super().step(closure) if finite else None
        self.found_inf = finite.logical_not().float()
        tails = self._copy_tails() if finite.device.type == "cpu" else []
        result = super().step(closure)
        for tail in tails:
            self._replace(tail)
        return result

    def _copy_tails(self) -> list["_Tail"]:
        """Copies what is left over of each tensor behind its whole cache lines."""
        tails = []
        for group in self.param_groups:
            for weight in group["params"]:
                count = weight.numel() % _CACHE_LINE
                if count == 0 or weight.grad is None or not weight.is_contiguous():
                    continue
                state = self.state.get(weight) or {"step": torch.zeros(())}
                moments = [state[name] if name in state else weight.new_zeros(count) for name in _MOMENTS]
                copies = [
                    F.pad(tensor.detach().reshape(-1)[-count:], (0, _CACHE_LINE - count))
                    for tensor in (weight, weight.grad, *moments)
                ]
                tails.append(_Tail(group, weight, count, copies, state["step"].clone()))
        return tails

    def _replace(self, tail: "_Tail") -> None:
        """Updates the copies, which are whole vectors, and puts them in the place of the tensors' ends."""
        weight, gradient, *moments = tail.copies
        adamw(
            [weight], [gradient], moments[:1], moments[1:], [], [tail.step],
            fused=True, found_inf=self.found_inf, amsgrad=False, maximize=False,
            beta1=tail.group["betas"][0], beta2=tail.group["betas"][1],
            lr=tail.group["lr"], weight_decay=tail.group["weight_decay"], eps=tail.group["eps"],
        )  # fmt: skip
        state = self.state[tail.weight]
        for tensor, copy in zip(
            (tail.weight, *(state[name] for name in _MOMENTS)), (weight, *moments), strict=True
        ):
            tensor.detach().view(-1)[-tail.count :].copy_(copy[: tail.count])


@dataclass(frozen=True)
class _Tail:
    """The elements of a tensor behind its whole cache lines, before the update."""

    group: dict[str, Any]
    weight: Tensor
    count: int
    copies: list[Tensor]
    """Of the weight, the gradient and the moments: a cache line each, with zeros at the end."""
    step: Tensor
    """Count of updates."""


def parameter_groups(
    model: nn.Module, weight_decay: float, layer_decay: float | None = None
) -> list[dict[str, Any]]:
    """Split the trainable parameters for AdamW; frozen ones are left out.

    Weight decay acts on tensors of two or more dimensions only: matrices and convolutions. Biases and the
    scales of norms have one dimension, and pulling those towards zero does not regularise.

    With layer-wise decay (paper, table 11 and section 4.1), backbone block i of d has
    layer_decay ** (d - 1 - i) of the learning rate, and the embeddings below the blocks one power more:
    layers near the input hold what images taught them, which holds for videos too. Modules outside the
    backbone are new, and have the whole rate.

    Args:
        model: its parameters in their own order, each once even if shared; names identify the backbone's.
        weight_decay: of matrices and convolutions.
        layer_decay: above 0, at most 1; None is the same learning rate for all.

    Returns:
        Groups `{"params", "weight_decay", "lr_scale"}`, none empty, one per pair of the latter two; small
        scales first, and of one scale the decayed ones first. The caller multiplies the learning rate of each
        step by `lr_scale`.
    """
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    depth = 1 + max((_block(name) for name, _ in model.named_parameters()), default=_BESIDE)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trainable:
        scale = 1.0 if layer_decay is None else layer_decay ** _layers_above(name, depth)
        decay = weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((scale, decay), []).append(parameter)
    return [
        {"params": groups[scale, decay], "weight_decay": decay, "lr_scale": scale}
        for scale, decay in sorted(groups, key=lambda group: (group[0], -group[1]))
    ]


def _block(name: str) -> int:
    """The number of the backbone's block that a parameter is in, or `_BESIDE`."""
    part, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if part == "blocks" else _BESIDE


def _layers_above(name: str, depth: int) -> int:
    """Blocks between a parameter and the end of the backbone; 0 for one that is not in it."""
    if name.partition(".")[0] in _EMBEDDINGS:
        return depth
    return 0 if _block(name) == _BESIDE else depth - 1 - _block(name)
