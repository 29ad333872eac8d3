"""Parts of the image ViT: patch embedding, spatial attention, MLP."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import UniFormerV2Config
from models.drop import Dropout
from models.linear import Linear, Origin, linear

QUICK_GELU_SLOPE = 1.702


class PatchEmbedding(nn.Module):
    """Patches of a clip as tokens: a convolution of stride (1, p, p), or (2, p, p) over 3 frames.

    Patches do not overlap in space, so the convolution is a gather and a matrix product. The weight has the
    convolution's shape (C, 3, kt, p, p), so image weights and released weights load unchanged.
    """

    def __init__(self, config: UniFormerV2Config) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.halves_frames = config.temporal_downsample
        self.weight = nn.Parameter(torch.empty(config.width, 3, *config.patch_kernel))
        self.bias = nn.Parameter(torch.zeros(config.width)) if config.patch_bias else None

    def forward(self, clips: Tensor) -> Tensor:  # B 3 T H W -> B T' N C
        taps = self.weight.shape[2]
        if self.halves_frames:
            clips = F.pad(clips, (0, 0, 0, 0, 1, 1))
        p = self.patch_size
        patches = (
            clips.unfold(2, taps, 2 if self.halves_frames else 1)  # B 3 T' H W taps
            .unflatten(4, (-1, p))
            .unflatten(3, (-1, p))  # B 3 T' h p w p taps
            .permute(0, 2, 3, 5, 1, 7, 4, 6)  # B T' h w 3 taps p p
            .flatten(4)
            .flatten(2, 3)  # B T' N 3*taps*p*p
        )
        return linear(patches, self.weight.flatten(1), self.bias)


class LayerScale(nn.Module):
    """A learnt factor per channel at the end of a residual branch, as in DeiT III and BEiT."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((width,), initial))

    def forward(self, x: Tensor) -> Tensor:  # B ... C -> B ... C
        return x * self.factor


def create_layer_scale(width: int, initial: float | None) -> nn.Module:
    """A `LayerScale`; an identity for None."""
    return nn.Identity() if initial is None else LayerScale(width, initial)


class RelativePositionBias(nn.Module):
    """BEiT's bias of an attention's scores: one per head and offset between query and key in the grid.

    table: ((2 g - 1)² + 3, heads), by row offset and column offset from 1 - g on; the last three rows are
    for the class token's scores of patches, the patches' scores of the class token, and its score of itself.
    """

    def __init__(self, grid: int, heads: int) -> None:
        super().__init__()
        self.grid = grid
        self.table = nn.Parameter(torch.zeros((2 * grid - 1) ** 2 + 3, heads))

    def forward(self) -> Tensor:  # -> heads 1+N 1+N
        grid, offsets = self.grid, 2 * self.grid - 1
        of_patches, of_class, to_class, own = self.table.T.split((offsets**2, 1, 1, 1), dim=1)
        by_offset = of_patches.unflatten(1, (offsets, offsets))
        # The window that begins at a query's row and column holds its keys in reverse order.
        windows = by_offset.unfold(1, grid, 1).unfold(2, grid, 1)  # heads g g g g
        patches = windows.flip(3, 4).flatten(1, 2).flatten(2)  # heads N N
        rows = torch.cat([to_class.unsqueeze(1).expand(-1, grid**2, -1), patches], dim=2)  # heads N 1+N
        first = torch.cat([own, of_class.expand(-1, grid**2)], dim=1)  # heads 1+N
        return torch.cat([first.unsqueeze(1), rows], dim=1)


class SpatialAttention(nn.Module):
    """Multi-head self-attention over the tokens of one frame, class token included: GS_MHRA, equation (7).

    relative_grid: patches along one side, for a `RelativePositionBias`; None has none. layer_scale: initial
    value of a `LayerScale` of the result; None has none.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        qkv_bias: bool,
        *,
        relative_grid: int | None = None,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = Linear(width, 3 * width, bias=qkv_bias)
        self.positions = None if relative_grid is None else RelativePositionBias(relative_grid, heads)
        self.out = Linear(width, width)
        self.layer_scale = create_layer_scale(width, layer_scale)

    def forward(self, x: Tensor, origin: Origin | None = None) -> Tensor:  # B T L C -> B T L C
        qkv = self.qkv(x, origin).flatten(0, 1).unflatten(-1, (3, self.heads, -1))  # BT L 3 heads D
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # BT heads L D
        bias = None if self.positions is None else self.positions().to(query.dtype)  # heads L L
        mixed = F.scaled_dot_product_attention(query, key, value, bias)  # BT heads L D
        return self.layer_scale(self.out(mixed.transpose(1, 2).reshape(x.shape)))


class ScaledLinear(Linear):
    """A linear layer with its weight, and its bias if `scale_bias`, multiplied by `scale`."""

    def __init__(self, inputs: int, outputs: int, *, scale: float, scale_bias: bool) -> None:
        super().__init__(inputs, outputs)
        self.scale = scale
        self.bias_scale = scale if scale_bias else 1.0

    def forward(self, x: Tensor, origin: Origin | None = None) -> Tensor:
        bias = self.bias if self.bias_scale == 1.0 else self.bias * self.bias_scale
        is_fp8 = self.fp8 and self.training
        return linear(x, self.weight, bias, scale=self.scale, origin=origin, fp8=is_fp8)


class Mlp(nn.Module):
    """The FFN: linear, activation, dropout, linear.

    QuickGELU is `x * sigmoid(s x) = silu(s x) / s` with `s = 1.702`. Both factors are folded into the
    matrix products: the widest tensor of the model then needs one kernel instead of three, and keeps one
    tensor for the backward instead of two.

    layer_scale: initial value of a `LayerScale` of the result; None has none. origin: of the input; where
    given, the output of the activation is computed again as well. What both save: docs/performance.md, "the
    model's step, experiments".
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: str,
        dropout: float = 0.0,
        layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.expand: Linear
        self.contract: Linear
        self.activation: nn.Module
        if activation == "quick_gelu":
            self.expand = ScaledLinear(width, hidden, scale=QUICK_GELU_SLOPE, scale_bias=True)
            self.activation = nn.SiLU()
            self.contract = ScaledLinear(hidden, width, scale=1 / QUICK_GELU_SLOPE, scale_bias=False)
        else:
            self.expand = Linear(width, hidden)
            self.activation = nn.GELU()
            self.contract = Linear(hidden, width)
        self.dropout = Dropout(dropout)
        self.layer_scale = create_layer_scale(width, layer_scale)

    def forward(
        self, x: Tensor, streams: Tensor | None = None, origin: Origin | None = None
    ) -> Tensor:  # B ... C -> B ... C
        hidden = self.expand(x, origin)
        activated = self.activation(hidden)
        dropped = self.dropout(activated, streams)
        again = Origin(self.activation, hidden) if origin is not None and dropped is activated else None
        return self.layer_scale(self.contract(dropped, again))


def initialise_vit_block(attention: SpatialAttention, mlp: Mlp, depth: int) -> None:
    """CLIP's initialisation of one of `depth` blocks; the last layer of a residual branch scales with the
    depth."""
    width = attention.out.in_features
    branch = (2 * depth) ** -0.5
    nn.init.normal_(attention.qkv.weight, std=width**-0.5)
    nn.init.normal_(attention.out.weight, std=width**-0.5 * branch)
    nn.init.normal_(mlp.expand.weight, std=(2 * width) ** -0.5)
    nn.init.normal_(mlp.contract.weight, std=width**-0.5 * branch)
    for layer in (attention.qkv, attention.out, mlp.expand, mlp.contract):
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
