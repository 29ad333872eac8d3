"""The Global UniBlock, section 3.2: cross attention from a query to all tokens of a clip."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import UniFormerV2Config
from models.drop import DropPath, MaskedBlock
from models.vit import Mlp


class DepthwiseConv3d(nn.Conv3d):
    """A depthwise 3x3x3 convolution with padding 1 on tokens in channels-last layout: the DPE of equation
    (8).

    It is the sum of three depthwise 2-D convolutions, of the previous, the same and the next frame, with
    the weight and bias of a `Conv3d`. For a clip of 64 frames of 24x24 tokens of 1,024 channels, forward
    and backward take 2.5 ms on an H100 in bf16; a depthwise `Conv3d` takes 720 ms, as PyTorch's gradient of
    its weight is slow. On CPUs the `Conv3d` takes 2.5 to 3 times as long.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, groups=channels)

    def forward(self, tokens: Tensor) -> Tensor:  # B T H W C -> B T H W C
        if tokens.device.type != "cpu":
            return self._convolve(tokens)
        # On CPUs with bf16, oneDNN's gradient of a depthwise convolution differs from run to run.
        with torch.autocast("cpu", enabled=False):
            return self._convolve(tokens.to(self.weight.dtype)).to(tokens.dtype)

    def _convolve(self, tokens: Tensor) -> Tensor:
        assert self.bias is not None  # the default of a convolution
        frames = tokens.flatten(0, 1).permute(0, 3, 1, 2)  # BT C H W, channels last in memory
        before, same, after = (
            F.conv2d(frames, self.weight[:, :, tap], bias, padding=1, groups=self.groups)
            .permute(0, 2, 3, 1)
            .unflatten(0, tokens.shape[:2])
            for tap, bias in enumerate((None, self.bias, None))
        )  # B T H W C
        no_padding = (0, 0) * 3  # of C, W and H
        return same + F.pad(before[:, :-1], (*no_padding, 1, 0)) + F.pad(after[:, 1:], (*no_padding, 0, 1))


class CrossAttention(nn.Module):
    """Cross MHRA of Q queries over M tokens, equations (11) to (13).

    Keys and values are not computed. With few queries it is cheaper to apply the key projection to each
    head's query (`q·(W x) = (Wᵀq)·x`), attend to the tokens themselves, and apply the value projection to
    the weighted sums. This replaces `2 M C²` multiply-accumulates by about `2 M heads C` and keeps no (M,
    2C) tensor for the backward. The key bias adds a constant to all scores of a query, which the softmax
    cancels. The value bias is added once, as the affinities sum to 1.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def affinity(self, queries: Tensor, tokens: Tensor) -> Tensor:  # B Q C, B M C -> B Q*heads M
        """The affinity of equation (13) for each head of each query; sums to 1 over the tokens."""
        query_weight, key_weight, _ = self.in_proj_weight.chunk(3)  # C C
        query_bias = self.in_proj_bias.chunk(3)[0]  # C
        per_head = (self.heads, -1)
        query = F.linear(queries, query_weight, query_bias).unflatten(-1, per_head)  # B Q heads D
        query = query * query.shape[-1] ** -0.5
        probe = torch.einsum("bqhd,hdc->bqhc", query, key_weight.unflatten(0, per_head))  # B Q heads C
        scores = probe.flatten(1, 2) @ tokens.transpose(1, 2)  # B Q*heads M
        return scores.softmax(-1, dtype=torch.float32).to(scores.dtype)

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:  # B Q C, B M C -> B Q C
        value_weight, value_bias = self.in_proj_weight.chunk(3)[2], self.in_proj_bias.chunk(3)[2]
        sums = (self.affinity(queries, tokens) @ tokens).unflatten(1, (-1, self.heads))  # B Q heads C
        value_weight = value_weight.unflatten(0, (self.heads, -1))  # heads D C
        values = torch.einsum("bqhc,hdc->bqhd", sums, value_weight)  # B Q heads D
        return self.out(values.flatten(2) + value_bias)


class GlobalUniBlock(MaskedBlock):
    """DPE, cross MHRA and FFN, equations (8) to (10), with the residual on the query that (9) omits.

    With `config.global_mlp_ratio` 0 there is no FFN.

    streams: (B, own masks), of `own_streams`; required in training if a drop rate is above 0.
    """

    def __init__(self, config: UniFormerV2Config, drop_path: float) -> None:
        super().__init__()
        width = config.width
        self.grid = config.grid
        self.dpe = DepthwiseConv3d(width) if config.global_dpe else None
        self.norm_query = nn.LayerNorm(width)
        self.norm_tokens = nn.LayerNorm(width)
        self.attention = CrossAttention(width, config.global_heads)
        hidden = config.global_mlp_width
        self.norm_mlp = nn.LayerNorm(width) if hidden else None
        self.mlp = Mlp(width, hidden, "quick_gelu", config.global_mlp_dropout) if hidden else None
        self.drop_attention = DropPath(drop_path)
        self.drop_mlp = DropPath(drop_path)
        self._initialise()

    def _initialise(self) -> None:
        if self.dpe is not None:
            assert self.dpe.bias is not None  # the default of a convolution
            nn.init.zeros_(self.dpe.bias)
        if self.mlp is not None:
            nn.init.xavier_uniform_(self.mlp.expand.weight)
            nn.init.zeros_(self.mlp.contract.weight)
            nn.init.zeros_(self.mlp.contract.bias)

    def forward(
        self,
        queries: Tensor,
        tokens: Tensor,
        streams: Tensor | None = None,
        *,
        context: Tensor | None = None,
    ) -> Tensor:  # B Q C, B T 1+N C, B K C -> B Q C
        tokens = self._with_positions(tokens)  # B M C
        if context is not None:
            tokens = torch.cat([context, tokens], dim=1)
        attended = self.attention(self.norm_query(queries), self.norm_tokens(tokens))
        queries = queries + self.drop_attention(attended, streams)
        if self.mlp is None or self.norm_mlp is None:
            return queries
        return queries + self.drop_mlp(self.mlp(self.norm_mlp(queries), streams), streams)

    def _with_positions(self, tokens: Tensor) -> Tensor:  # B T 1+N C -> B T*(1+N) C
        """Adds the dynamic position embedding (DPE) to the patches; class tokens have no position."""
        if self.dpe is None:
            return tokens.flatten(1, 2)
        class_tokens, patches = tokens[:, :, :1], tokens[:, :, 1:]
        positions = self.dpe(patches.unflatten(2, (self.grid, self.grid))).flatten(2, 3)  # B T N C
        return torch.cat([class_tokens, patches + positions], dim=2).flatten(1, 2)
