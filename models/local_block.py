"""The Local UniBlock with its local temporal MHRA, section 3.1, or with what the paper compares with it."""

import torch
from torch import Tensor, nn

from models.batch_norm import normalise
from models.config import UniFormerV2Config
from models.drop import DropPath, MaskedBlock
from models.global_block import DepthwiseConv3d
from models.linear import Linear, Origin
from models.temporal_modules import TemporalShift, create_branch
from models.vit import Mlp, SpatialAttention, initialise_vit_block


class LocalTemporalMHRA(nn.Module):
    """Local temporal MHRA, equations (4) to (6), over the same patch in 3 frames.

    Batch norm, reduction to r channels, depthwise convolution over 3 frames, expansion to C channels. The
    1x1x1 convolutions are linear layers on the last dimension, which have the same results and a faster
    backward. The batch norm receives tokens as rows, so its statistics are those of `BatchNorm3d`, and
    `SyncBatchNorm` can replace it. The expansion is zero-initialised, so a new model computes the same as
    its image ViT.
    """

    def __init__(self, width: int, reduced: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width)
        self.reduce = Linear(width, reduced)
        self.temporal = nn.Conv2d(reduced, reduced, (3, 1), padding=(1, 0), groups=reduced)
        self.expand = Linear(reduced, width)
        nn.init.zeros_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)

    def forward(self, patches: Tensor, recomputes_inputs: bool = False) -> Tensor:  # B T N C -> B T N C
        """recomputes_inputs: whether the backward computes the outputs of the batch norm, where `normalise`
        can, and of the convolution again, instead of keeping them."""
        rows = patches.flatten(0, 2)
        normed, origin = normalise(self.norm, rows) if recomputes_inputs else (self.norm(rows), None)
        reduced = self.reduce(normed, origin).view(*patches.shape[:-1], -1)  # B T N r
        origin = Origin(self._over_frames, reduced) if recomputes_inputs else None
        return self.expand(self._over_frames(reduced), origin)

    def _over_frames(self, reduced: Tensor) -> Tensor:  # B T N r -> B T N r
        return self.temporal(reduced.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # channels last in memory


class LocalUniBlock(MaskedBlock):
    """[DPE →] [local MHRA or temporal module] → spatial attention → [second local MHRA] → MLP, equations (1)
    to (3).

    Each is a residual branch with its own drop-path, the DPE without one. Without local parts this is the
    block of the image ViT.

    layer: number of the block, from 0; `config.local_layers` selects those with local parts. streams: (B,
    own masks), of `own_streams`; required in training if a drop rate is above 0.

    The backward computes the outputs of norms, of the MLP's activation and of the local MHRA's convolution
    again: always on a CPU, where that takes no more time (docs/performance.md, "the model's step,
    experiments"), and on a GPU if the model recomputes blocks and this is none of them. A GPU with enough
    memory has no use for it.
    """

    def __init__(self, config: UniFormerV2Config, drop_path: float, layer: int) -> None:
        super().__init__()
        width, eps = config.width, config.norm_eps
        has_local = config.has_local(layer)
        local = config.local_mhra if has_local else 0
        self.grid = config.grid
        self.recomputes_inputs = 0 < config.recomputed_blocks <= layer
        self.local_dpe = _zero_dpe(width) if config.local_dpe and local else None
        self.local_1 = LocalTemporalMHRA(width, config.local_width) if local >= 1 else None
        self.norm_1 = nn.LayerNorm(width, eps)
        self.attention = SpatialAttention(
            width,
            config.heads,
            config.qkv_bias,
            relative_grid=config.grid if config.relative_positions else None,
            layer_scale=config.layer_scale,
        )
        self.local_2 = LocalTemporalMHRA(width, config.local_width) if local == 2 else None
        self.norm_2 = nn.LayerNorm(width, eps)
        self.mlp = Mlp(width, config.mlp_width, config.activation, layer_scale=config.layer_scale)
        self.drop_local_1 = DropPath(drop_path)
        self.drop_attention = DropPath(drop_path)
        self.drop_local_2 = DropPath(drop_path)
        self.drop_mlp = DropPath(drop_path)
        self.temporal = create_branch(config) if has_local else None
        self.shift = TemporalShift() if has_local and config.temporal_module == "temporal_shift" else None
        if self.temporal is not None:
            self.drop_temporal = DropPath(drop_path)
        initialise_vit_block(self.attention, self.mlp, config.depth)

    def forward(self, x: Tensor, streams: Tensor | None = None) -> Tensor:  # B T 1+N C -> B T 1+N C
        if self.local_dpe is not None:
            x = self._with_positions(x, self.local_dpe)
        if self.local_1 is not None:
            x = self._with_local(x, self.local_1, self.drop_local_1, streams)
        if self.temporal is not None:
            class_tokens, patches = _split(x)
            branch = self.drop_temporal(self.temporal(patches), streams)
            x = torch.cat([class_tokens, patches + branch], dim=2)
        attended = x if self.shift is None else torch.cat([x[:, :, :1], self.shift(x[:, :, 1:])], dim=2)
        branch = self.attention(self.norm_1(attended), self._origin(self.norm_1, attended))
        x = x + self.drop_attention(branch, streams)
        if self.local_2 is not None:
            x = self._with_local(x, self.local_2, self.drop_local_2, streams)
        branch = self.mlp(self.norm_2(x), streams, self._origin(self.norm_2, x))
        return x + self.drop_mlp(branch, streams)

    def _origin(self, norm: nn.Module, x: Tensor) -> Origin | None:
        return Origin(norm, x) if self._recomputes_inputs(x) else None

    def _recomputes_inputs(self, x: Tensor) -> bool:
        return x.device.type == "cpu" or self.recomputes_inputs

    def _with_local(
        self, x: Tensor, local: LocalTemporalMHRA, drop: DropPath, streams: Tensor | None
    ) -> Tensor:  # B T 1+N C -> B T 1+N C
        class_tokens, patches = _split(x)
        branch = drop(local(patches, self._recomputes_inputs(x)), streams)
        return torch.cat([class_tokens, patches + branch], dim=2)

    def _with_positions(self, x: Tensor, dpe: DepthwiseConv3d) -> Tensor:  # B T 1+N C -> B T 1+N C
        class_tokens, patches = _split(x)
        positions = dpe(patches.unflatten(2, (self.grid, self.grid))).flatten(2, 3)
        return torch.cat([class_tokens, patches + positions], dim=2)


def use_fp8(model: nn.Module) -> None:
    """Computes the linear layers of the backbone's blocks with products in FP8, in training.

    These are the QKV projections, the attention's outputs and the MLPs. Embeddings, norms, attention, local
    parts, global blocks and head stay as they are, and so does evaluation.
    """
    for block in model.modules():
        if isinstance(block, LocalUniBlock):
            for layer in (block.attention.qkv, block.attention.out, block.mlp.expand, block.mlp.contract):
                layer.fp8 = True


def _zero_dpe(width: int) -> DepthwiseConv3d:
    """A zero-initialised DPE, with which a new model computes the same as its image ViT."""
    dpe = DepthwiseConv3d(width)
    for parameter in dpe.parameters():
        nn.init.zeros_(parameter)
    return dpe


def _split(x: Tensor) -> tuple[Tensor, ...]:  # B T 1+N C -> B T 1 C, B T N C
    """Class tokens and patches. The gradient of a split is one copy, that of two slices a sum of two."""
    return x.split((1, x.shape[2] - 1), dim=2)
