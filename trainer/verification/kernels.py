"""Times alternative forms of the model's operations, forward and backward."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.global_block import DepthwiseConv3d
from trainer.verification.gpu import seconds_of
from trainer.verification.steps import VerificationTask


def measure(task: VerificationTask) -> None:
    """Measures depthwise convolutions, widths of the local MHRA, attention and norms at the sizes of L/14."""
    device = task.device
    kind = torch.bfloat16 if task.gpu else torch.float32
    batch, frames, side, width = (4, 16, 24, 1024) if task.gpu else (1, 4, 4, 64)

    def timed(
        name: str, work: Callable[[Tensor], Tensor], *shape: int, module: nn.Module | None = None
    ) -> None:
        given = torch.randn(*shape, device=device, dtype=kind, requires_grad=True)
        gradient = torch.randn_like(work(given).detach())
        inputs = [given, *(module.parameters() if module else ())]

        def both() -> None:
            torch.autograd.grad(work(given), inputs, gradient)

        task.report.measure(name, f"{1e6 * seconds_of(both, device):.0f} µs forward and backward")

    def volume(module: nn.Module) -> Callable[[Tensor], Tensor]:
        """The module on tokens B T H W C, the order in memory."""
        return lambda tokens: module(tokens.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)

    tokens = (batch, frames, side, side, width)
    spatial = nn.Conv3d(width, width, 3, padding=1, groups=width, device=device, dtype=kind)
    timed("depthwise Conv3d 3x3x3, channels last", volume(spatial), *tokens, module=spatial)
    planes = DepthwiseConv3d(width).to(device, kind)
    timed("the same as three Conv2d", planes, *tokens, module=planes)
    for channels in (int(width / 1.5), -(-int(width / 1.5) // 8) * 8):
        narrow = (batch, frames, side, side, channels)
        temporal = nn.Conv3d(
            channels, channels, (5, 1, 1), padding=(2, 0, 0), groups=channels, device=device, dtype=kind
        )
        timed(
            f"depthwise temporal Conv3d 5x1x1, {channels} channels",
            volume(temporal),
            *narrow,
            module=temporal,
        )
        flat = nn.Conv2d(
            channels, channels, (5, 1), padding=(2, 0), groups=channels, device=device, dtype=kind
        )
        timed(
            f"the same as Conv2d over T x HW, {channels} channels",
            partial(_by_time, flat),
            *narrow,
            module=flat,
        )
        linear = nn.Linear(width, channels, device=device, dtype=kind)
        timed(f"linear {width} to {channels}", linear, *tokens, module=linear)
    norm = nn.BatchNorm3d(width, device=device, dtype=kind)
    timed("batch norm, channels last", volume(norm), *tokens, module=norm)
    layer_norm = nn.LayerNorm(width, device=device, dtype=kind)
    timed("layer norm", layer_norm, *tokens, module=layer_norm)
    heads = width // 64 or 1
    queries = (batch * frames, heads, side * side + 1, width // heads)
    timed("attention within a frame", lambda x: functional.scaled_dot_product_attention(x, x, x), *queries)


def _by_time(conv: nn.Conv2d, tokens: Tensor) -> Tensor:
    batch, frames, height, width, channels = tokens.shape
    flat = tokens.flatten(2, 3).permute(0, 3, 1, 2)  # B C T HW, channels last
    return conv(flat).permute(0, 2, 3, 1).view(batch, frames, height, width, channels)
