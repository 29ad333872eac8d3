"""The Global UniBlock, section 3.2: a query gathers the whole clip into a video token."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.config import UniFormerV2Config
from models.depthwise import DepthwiseConv3d
from models.drop import DropPath
from models.vit import Mlp


class CrossAttention(nn.Module):
    """Cross MHRA of few queries over many tokens, equations (11) to (13).

    Keys and values are never computed. With few queries it is cheaper to take each head's query through the
    key projection (`q·(W x) = (Wᵀq)·x`), attend to the tokens themselves, and take what was gathered through
    the value projection. That replaces `2 M C²` multiply-accumulates by about `2 M heads C` and keeps no
    (M, 2C) tensor for the backward. The key bias adds the same to every score of a query, so the softmax
    cancels it; the value bias is added once, since the affinities sum to 1.
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
        """How much each head of each query takes of each token; sums to 1 over the tokens."""
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
        gathered = (self.affinity(queries, tokens) @ tokens).unflatten(1, (-1, self.heads))  # B Q heads C
        value_weight = value_weight.unflatten(0, (self.heads, -1))  # heads D C
        values = torch.einsum("bqhc,hdc->bqhd", gathered, value_weight)  # B Q heads D
        return self.out(values.flatten(2) + value_bias)


class GlobalUniBlock(nn.Module):
    """DPE, cross MHRA and FFN, equations (8) to (10), with the residual on the query that (9) leaves out.

    `streams`, (B, layers), are needed in training where anything is dropped (see `mask_streams`).
    """

    def __init__(self, config: UniFormerV2Config, drop_path: float) -> None:
        super().__init__()
        width = config.width
        self.grid = config.grid
        self.dpe = DepthwiseConv3d(width)
        self.norm_query = nn.LayerNorm(width)
        self.norm_tokens = nn.LayerNorm(width)
        self.attention = CrossAttention(width, config.global_heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = Mlp(width, config.mlp_width, "quick_gelu", config.global_mlp_dropout)
        self.drop_attention = DropPath(drop_path)
        self.drop_mlp = DropPath(drop_path)
        self._initialise()

    def _initialise(self) -> None:
        assert self.dpe.bias is not None  # a convolution has one unless told otherwise
        nn.init.zeros_(self.dpe.bias)
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
        gathered = self.attention(self.norm_query(queries), self.norm_tokens(tokens))
        queries = queries + self.drop_attention(gathered, streams)
        return queries + self.drop_mlp(self.mlp(self.norm_mlp(queries), streams), streams)

    def _with_positions(self, tokens: Tensor) -> Tensor:  # B T 1+N C -> B T*(1+N) C
        """Adds the dynamic position embedding to the patches; class tokens have no position."""
        class_tokens, patches = tokens[:, :, :1], tokens[:, :, 1:]
        positions = self.dpe(patches.unflatten(2, (self.grid, self.grid))).flatten(2, 3)  # B T N C
        return torch.cat([class_tokens, patches + positions], dim=2).flatten(1, 2)
