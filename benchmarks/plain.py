"""UniFormerV2 written the obvious way, with the modules that PyTorch has for each part.

It computes the same as `models.UniFormerV2` from the same weights, and is what `bench.py model` compares it
with. Nothing here is optimised:

| part | here | `models` |
|---|---|---|
| tokens | sequence-first, L BT C | batch-first, B T L C |
| attention | `nn.MultiheadAttention` | one projection, fused attention |
| QuickGELU | `x * sigmoid(1.702 x)` | SiLU with scaled weights |
| layer norms | computed in float32, cast up and back | native |
| local MHRA, DPE | `BatchNorm3d`, `Conv3d` | linear layers, `Conv2d` |
| global blocks | keys and values of all tokens | applied to the queries and the weighted sums |
| frozen backbone | the optimiser leaves it out; autograd passes through it | no autograd |
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import ModelError, UniFormerV2Config
from models.drop import linear_rates

_ONLY = {
    "activation": "quick_gelu",
    "qkv_bias": True,
    "layer_scale": None,
    "absolute_positions": True,
    "relative_positions": False,
    "frame_feature": "class_token",
    "local_dpe": False,
    "temporal_module": "none",
    "global_queries": 1,
    "fusion": "sequential",
    "recomputed_blocks": 0,
}
"""Fields of the config that have one value here: those of the paper's main models."""
_RENAMED = (
    (r"\.attention\.qkv\.", ".attention.in_proj_"),
    (r"\.attention\.out\.", ".attention.out_proj."),
    (r"^fusion\.query$", "query"),
    (r"^fusion\.blocks\.", "global_blocks."),
)
"""Names of `models.UniFormerV2` as patterns, and what replaces them here; other names are the same."""


class Norm(nn.LayerNorm):
    """A layer norm that is computed in at least float32, whatever the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return F.layer_norm(x.to(wide), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class QuickGelu(nn.Module):
    """`x * sigmoid(1.702 x)`."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class DropPath(nn.Module):
    """Drops the branch of whole clips, in training."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, clips: int) -> Tensor:  # L B*T C -> L B*T C
        if self.rate == 0 or not self.training:
            return x
        kept = x.new_empty(clips).bernoulli_(1 - self.rate).repeat_interleave(x.shape[1] // clips)
        return x * kept.view(1, -1, 1) / (1 - self.rate)


class Mlp(nn.Module):
    """Linear, QuickGELU, dropout, linear."""

    def __init__(self, width: int, hidden: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.activation = QuickGelu()
        self.dropout = nn.Dropout(dropout)
        self.contract = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.contract(self.dropout(self.activation(self.expand(x))))


class LocalMhra(nn.Module):
    """Equations (4) to (6): batch norm and three convolutions over the patches of a clip."""

    def __init__(self, width: int, reduced: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm3d(width)
        self.reduce = nn.Conv3d(width, reduced, 1)
        self.temporal = nn.Conv3d(reduced, reduced, (3, 1, 1), padding=(1, 0, 0), groups=reduced)
        self.expand = nn.Conv3d(reduced, width, 1)

    def forward(self, volume: Tensor) -> Tensor:  # B C T h w -> B C T h w
        return self.expand(self.temporal(self.reduce(self.norm(volume))))


class Block(nn.Module):
    """[local MHRA] → spatial attention → [local MHRA] → MLP, equations (1) to (3)."""

    def __init__(self, config: UniFormerV2Config, drop_path: float, layer: int) -> None:
        super().__init__()
        width, reduced, eps = config.width, config.local_width, config.norm_eps
        local = config.local_mhra if config.has_local(layer) else 0
        self.grid = config.grid
        self.local_1 = LocalMhra(width, reduced) if local >= 1 else None
        self.norm_1 = Norm(width, eps)
        self.attention = nn.MultiheadAttention(width, config.heads)
        self.local_2 = LocalMhra(width, reduced) if local == 2 else None
        self.norm_2 = Norm(width, eps)
        self.mlp = Mlp(width, config.mlp_width)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, clips: int) -> Tensor:  # 1+N B*T C -> 1+N B*T C
        if self.local_1 is not None:
            x = self._add_local(x, self.local_1, clips)
        normed = self.norm_1(x)
        x = x + self.drop_path(self.attention(normed, normed, normed, need_weights=False)[0], clips)
        if self.local_2 is not None:
            x = self._add_local(x, self.local_2, clips)
        return x + self.drop_path(self.mlp(self.norm_2(x)), clips)

    def _add_local(self, x: Tensor, local: LocalMhra, clips: int) -> Tensor:
        class_token, patches = x[:1], x[1:]
        branch = to_sequence(local(to_volume(patches, clips, self.grid)))
        return torch.cat([class_token, patches + self.drop_path(branch, clips)])


class GlobalBlock(nn.Module):
    """DPE, cross attention of the query over all tokens, MLP, equations (8) to (10)."""

    def __init__(self, config: UniFormerV2Config, drop_path: float) -> None:
        super().__init__()
        width = config.width
        self.grid = config.grid
        self.dpe = nn.Conv3d(width, width, 3, padding=1, groups=width) if config.global_dpe else None
        self.norm_query = Norm(width)
        self.norm_tokens = Norm(width)
        self.attention = nn.MultiheadAttention(width, config.global_heads)
        self.norm_mlp = Norm(width)
        self.mlp = Mlp(width, config.global_mlp_width, config.global_mlp_dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, query: Tensor, x: Tensor) -> Tensor:  # 1 B C, 1+N B*T C -> 1 B C
        clips = query.shape[1]
        if self.dpe is not None:
            class_token, patches = x[:1], x[1:]
            positions = to_sequence(self.dpe(to_volume(patches, clips, self.grid)))
            x = torch.cat([class_token, patches + positions])
        tokens = x.unflatten(1, (clips, -1)).permute(2, 0, 1, 3).flatten(0, 1)  # T*(1+N) B C
        tokens = self.norm_tokens(tokens)
        attended = self.attention(self.norm_query(query), tokens, tokens, need_weights=False)[0]
        query = query + self.drop_path(attended, clips)
        return query + self.drop_path(self.mlp(self.norm_mlp(query)), clips)


class PlainUniFormerV2(nn.Module):
    """UniFormerV2, scene, temporal and frozen form; clips to logits.

    config: the description of the model. Raises `ModelError` for one that is not of the paper's main models:
    CLIP's backbone, sequential fusion, no recomputation.
    through_frozen: whether autograd passes through a frozen backbone, as in training programs that freeze
    it by leaving its parameters out of the optimiser. Otherwise they take no gradient, and autograd begins
    at the global blocks.
    """

    def __init__(self, config: UniFormerV2Config, *, through_frozen: bool = True) -> None:
        super().__init__()
        for name, value in _ONLY.items():
            if getattr(config, name) != value:
                raise ModelError(f"the plain model has {name} {value}, not {getattr(config, name)}")
        self.config = config
        width, scale = config.width, config.width**-0.5
        halves = config.temporal_downsample
        self.patch_embedding = nn.Conv3d(
            3,
            width,
            config.patch_kernel,
            stride=(2 if halves else 1, config.patch_size, config.patch_size),
            padding=(1 if halves else 0, 0, 0),
            bias=config.patch_bias,
        )
        self.class_token = nn.Parameter(scale * torch.randn(width))
        self.position_embedding = nn.Parameter(scale * torch.randn(1 + config.grid**2, width))
        self.ln_pre = Norm(width, config.norm_eps) if config.ln_pre else nn.Identity()
        rates = linear_rates(config.drop_path, config.depth)
        self.blocks = nn.ModuleList([Block(config, rate, layer) for layer, rate in enumerate(rates)])
        rates = linear_rates(config.global_drop_path, len(config.global_layers))
        self.global_blocks = nn.ModuleList([GlobalBlock(config, rate) for rate in rates])
        self.query = nn.Parameter(torch.zeros(1, 1, width)) if config.global_layers else None
        self.balance = nn.Parameter(torch.zeros(width)) if config.is_balanced else None
        self.head_norm = nn.LayerNorm(width)
        self.head_dropout = nn.Dropout(config.head_dropout)
        self.head = nn.Linear(width, config.num_classes)
        if config.frozen_backbone and not through_frozen:
            for parameter in self.backbone_parameters():
                parameter.requires_grad_(False)

    def backbone_parameters(self) -> list[nn.Parameter]:
        """The parameters of the image ViT, which a frozen backbone does not train."""
        prefixes = ("patch_embedding", "class_token", "position_embedding", "ln_pre", "blocks")
        return [value for name, value in self.named_parameters() if name.split(".")[0] in prefixes]

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters for the optimiser."""
        left_out = {id(value) for value in self.backbone_parameters()} if self.config.frozen_backbone else ()
        return [value for value in self.parameters() if id(value) not in left_out]

    def forward(self, clips: Tensor) -> Tensor:  # B 3 T H W -> B K
        batch = clips.shape[0]
        patches = to_sequence(self.patch_embedding(clips))  # N B*T' C
        class_token = self.class_token.expand(1, patches.shape[1], -1)
        x = torch.cat([class_token, patches]) + self.position_embedding.unsqueeze(1)
        x = self.ln_pre(x)
        query = None if self.query is None else self.query.expand(-1, batch, -1)
        global_blocks = iter(self.global_blocks)
        for layer, block in enumerate(self.blocks):
            x = block(x, batch)
            if layer in self.config.global_layers:
                query = next(global_blocks)(query, x)
        frame_mean = x[0].unflatten(0, (batch, -1)).mean(1)  # B C
        if query is None:
            summary = frame_mean
        elif self.balance is None:
            summary = query.squeeze(0)
        else:
            share = torch.sigmoid(self.balance)
            summary = (1 - share) * query.squeeze(0) + share * frame_mean
        return self.head(self.head_dropout(self.head_norm(summary)))


def to_volume(patches: Tensor, clips: int, grid: int) -> Tensor:  # N B*T C -> B C T h w
    return patches.unflatten(1, (clips, -1)).permute(1, 3, 2, 0).unflatten(3, (grid, grid))


def to_sequence(volume: Tensor) -> Tensor:  # B C T h w -> N B*T C
    return volume.flatten(3).permute(3, 0, 2, 1).flatten(1, 2)


def plain_name(name: str) -> str:
    """The name here of a tensor of `models.UniFormerV2`."""
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def load_weights(plain: PlainUniFormerV2, state: Mapping[str, Tensor]) -> None:
    """Loads the state dict of a `models.UniFormerV2` of the same config.

    Weights of its linear layers become those of 1x1x1 convolutions. Raises RuntimeError, which lists the
    names, if the tensors are not those of this model.
    """
    own = plain.state_dict()
    renamed = {plain_name(name): tensor for name, tensor in state.items()}
    plain.load_state_dict(
        {
            name: tensor.view(own[name].shape)
            if name in own and tensor.numel() == own[name].numel()
            else tensor
            for name, tensor in renamed.items()
        }
    )
