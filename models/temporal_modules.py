"""Temporal modules that the paper compares with the local MHRA, tables 9b and 15.

Each acts on the patches, B T N C, and is a residual branch before the spatial attention of a block, except
the temporal shift, which moves channels of that attention's input, and the temporal transformer, which
follows the last block. Joint space-time MHSA needs no module: the ViT's own attention gets the tokens of all
frames at once (`UniFormerV2Config.attention_shape`).

The last layer of each branch is zero-initialised, as that of the local MHRA: a new model computes the same
as its image ViT. The temporal shift has no such layer.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import UniFormerV2Config
from models.linear import Linear
from models.vit import Mlp, SpatialAttention, initialise_vit_block

TRANSFORMER_LAYERS = 6  # of the temporal transformer, appendix C
_SHIFTED = 8  # an eighth of the channels comes from the previous frame, and an eighth from the next


class TemporalAttention(nn.Module):
    """Multi-head self-attention of a patch over all frames: Temporal MHSA of table 9b; with the spatial
    attention that follows, Divided Space-Time MHSA of table 15 (TimeSformer)."""

    def __init__(self, config: UniFormerV2Config) -> None:
        super().__init__()
        width = config.width
        self.norm = nn.LayerNorm(width, config.norm_eps)
        self.attention = SpatialAttention(width, config.heads, qkv_bias=True)
        nn.init.normal_(self.attention.qkv.weight, std=width**-0.5)
        nn.init.zeros_(self.attention.qkv.bias)
        nn.init.zeros_(self.attention.out.weight)
        nn.init.zeros_(self.attention.out.bias)

    def forward(self, patches: Tensor) -> Tensor:  # B T N C -> B T N C
        return self.attention(self.norm(patches).transpose(1, 2)).transpose(1, 2)


class TemporalConvolution(nn.Module):
    """Batch norm and a depthwise convolution over 3 frames: Temporal Convolution of tables 9b and 15.

    A full convolution would have 3 C² weights per block; table 15 counts no more parameters than for mean
    pooling.
    """

    def __init__(self, config: UniFormerV2Config) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(config.width)
        self.temporal = _temporal_convolution(config.width)
        nn.init.zeros_(self.temporal.weight)
        assert self.temporal.bias is not None  # the default of a convolution
        nn.init.zeros_(self.temporal.bias)

    def forward(self, patches: Tensor) -> Tensor:  # B T N C -> B T N C
        x = self.norm(patches.flatten(0, 2)).view(patches.shape)
        return _over_frames(self.temporal, x)


class STAdapter(nn.Module):
    """ST-Adapter (Pan et al. 2022), table 9b: reduction to r channels, depthwise convolution over 3 frames,
    GELU, expansion."""

    def __init__(self, config: UniFormerV2Config) -> None:
        super().__init__()
        self.reduce = Linear(config.width, config.local_width)
        self.temporal = _temporal_convolution(config.local_width)
        self.expand = Linear(config.local_width, config.width)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)

    def forward(self, patches: Tensor) -> Tensor:  # B T N C -> B T N C
        return self.expand(F.gelu(_over_frames(self.temporal, self.reduce(patches))))


class TemporalShift(nn.Module):
    """Temporal Shift of table 15 (TSM, Lin et al. 2019): exchanges channels between neighbouring frames.

    Beyond the first and the last frame are zeros. Only the attention's input is shifted, not the residual.
    """

    def forward(self, patches: Tensor) -> Tensor:  # B T N C -> B T N C
        count = patches.shape[-1] // _SHIFTED
        before, after, same = patches.split([count, count, patches.shape[-1] - 2 * count], dim=-1)
        no_padding = (0, 0) * 2  # of C and N
        before = F.pad(before[:, :-1], (*no_padding, 1, 0))
        after = F.pad(after[:, 1:], (*no_padding, 0, 1))
        return torch.cat([before, after, same], dim=-1)


class TemporalTransformer(nn.Module):
    """Six transformer layers over the class tokens (frame features) of all frames, after the backbone:
    Temporal Transformer of table 15 (STAM, Sharir et al. 2021)."""

    def __init__(self, config: UniFormerV2Config) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_TransformerLayer(config) for _ in range(TRANSFORMER_LAYERS)])

    def forward(self, features: Tensor) -> Tensor:  # B T C -> B T C
        x = features.unsqueeze(1)
        for layer in self.layers:
            x = layer(x)
        return x.squeeze(1)


class _TransformerLayer(nn.Module):
    """A pre-norm transformer layer of the ViT's width, heads and MLP."""

    def __init__(self, config: UniFormerV2Config) -> None:
        super().__init__()
        width, eps = config.width, config.norm_eps
        self.norm_1 = nn.LayerNorm(width, eps)
        self.attention = SpatialAttention(width, config.heads, qkv_bias=True)
        self.norm_2 = nn.LayerNorm(width, eps)
        self.mlp = Mlp(width, config.mlp_width, config.activation)
        initialise_vit_block(self.attention, self.mlp, TRANSFORMER_LAYERS)
        nn.init.zeros_(self.attention.out.weight)
        nn.init.zeros_(self.mlp.contract.weight)

    def forward(self, x: Tensor) -> Tensor:  # B 1 T C -> B 1 T C
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


def create_branch(config: UniFormerV2Config) -> nn.Module | None:
    """The module of `config.temporal_module` that is a residual branch of a block; None if it is none."""
    if config.temporal_module == "temporal_mhsa":
        return TemporalAttention(config)
    if config.temporal_module == "temporal_convolution":
        return TemporalConvolution(config)
    return STAdapter(config) if config.temporal_module == "st_adapter" else None


def _temporal_convolution(channels: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, (3, 1), padding=(1, 0), groups=channels)


def _over_frames(convolution: nn.Conv2d, patches: Tensor) -> Tensor:  # B T N C -> B T N C
    """Channels are last in memory before and after."""
    return convolution(patches.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
